"""Folding rotations into weights: the residual stream, or the heads of an attention's values, in another basis.

    stream = residual_stream(program)
    rotate_stream(editor, stream, orthogonal)    # the function stays what it was

The residual stream is everything that sums connect with the token embeddings. A root-mean-square norm without its gain
commutes with a rotation, so what writes to the stream is rotated on the way in, what reads from it (behind its norms,
whose gains move into the readers) is rotated back, and nothing in between changes (Ashkboos et al. 2024, SliceGPT,
arXiv:2401.15024). As in `graphwright.folding`, everything is found through the dataflow.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import structure
from graphwright.folding import PER_TOKEN, SIZES, Operand, Site, constant, keeps_channels, multiply, readers, value_of
from graphwright.ops import grouped_linear, rms_norm
from graphwright.program import Program
from graphwright.rewrite import Editor, describe

aten = torch.ops.aten


@dataclass
class Stream:
    """A residual stream of `width` channels.

    Attributes:
        width: K.
        writes: weights, biases and tables whose rows or columns are channels of the stream.
        reads: weights that are multiplied with the stream itself.
        norms: norms of the stream, each with the weights that are multiplied with its result.
    """

    width: int
    writes: list[Operand] = field(default_factory=list)
    reads: list[Operand] = field(default_factory=list)
    norms: dict[fx.Node, list[Operand]] = field(default_factory=dict)


@dataclass(frozen=True)
class NoStream:
    """Why a program has no residual stream that can be rotated."""

    reason: str


def residual_stream(program: Program, norms: Container[Any] = frozenset({rms_norm.target})) -> Stream | NoStream:
    """The stream that the token embeddings feed, or what stands in the way; `norms` may stand between it and layers."""
    found = [node for node, _ in structure.embeddings(program)] or list(program.calls(aten.embedding.default))
    if not found:
        return NoStream("the program looks up no embeddings")
    search = _Search(Stream(int(found[0].meta["val"].shape[-1])), norms)
    try:
        search.join(found[0])
    except _BlockedError as blocked:
        return NoStream(str(blocked))
    return search.stream


def rotate_stream(editor: Editor, stream: Stream, rotation: Tensor) -> None:
    """Turns a stream by an orthogonal matrix [K, K], float64 or float32."""
    for norm, weights in stream.norms.items():
        gain = _gain(editor.program, norm)
        for operand in weights:
            if gain is not None:
                multiply(editor, operand, gain)
            rotate(editor, operand, rotation)
        norm.args = (norm.args[0], None, norm.args[2])
        editor.note(norm, f"gain moved into {len(weights)} layers")
    for operand in (*stream.writes, *stream.reads):
        rotate(editor, operand, rotation)


def rotate_heads(editor: Editor, site: Site, rotation: Tensor) -> bool:
    """Turns each head of an attention's values by an orthogonal matrix [head_dim, head_dim].

    Returns:
        Whether it could: the site is behind an attention, and its channels come in whole heads.
    """
    head_dim = rotation.shape[0]
    rows = site.rows
    if site.attention is None or len(rows) % head_dim or site.channels % head_dim:
        return False
    heads = rows.unflatten(0, (-1, head_dim))
    # Whole heads of the maker, in its order.
    if not torch.equal(heads, heads[:, :1] + torch.arange(head_dim)) or (heads[:, 0] % head_dim).any():
        return False
    chosen = torch.eye(site.channels, dtype=rotation.dtype)
    for start in heads[:, 0].unique().tolist():
        chosen[start : start + head_dim, start : start + head_dim] = rotation
    for operand in site.made_by:
        rotate(editor, operand, chosen)
    for operand in site.weights:
        rotate(editor, operand, torch.block_diag(*[rotation] * len(heads)))
    editor.note(site.maker, f"{len(heads)} heads")
    return True


def rotate(editor: Editor, operand: Operand, rotation: Tensor) -> None:
    """Multiplies a constant by a matrix [K, K] along its axis: what makes channels x makes x @ rotation."""
    value = value_of(editor.program, operand)
    turned = (value.movedim(operand.axis, -1).to(rotation.dtype) @ rotation).movedim(-1, operand.axis)
    editor.set_weight(operand.node, operand.position, turned.to(value.dtype).contiguous())


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64, all of whose entries are of similar size.

    For size = 2^k * m it is the Kronecker product of the Hadamard matrix of 2^k and a random orthogonal matrix of m,
    with random signs.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    odd = torch.linalg.qr(torch.randn(size // power, size // power, generator=generator, dtype=torch.float64))[0]
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
    return torch.kron(odd.contiguous(), matrix) * signs


def _gain(program: Program, norm: fx.Node) -> Tensor | None:
    if norm.args[1] is None:
        return None
    gain = value_of(program, Operand(norm, 1, 0)).float()
    return 1 + gain if len(norm.args) > 3 and norm.args[3] else gain


class _BlockedError(Exception):
    """A node that a rotation cannot pass."""


class _Search:
    """Collects everything that sums and per-token operations connect with a node."""

    def __init__(self, stream: Stream, norms: Container[Any]) -> None:
        self.stream = stream
        self.norms = norms
        self.seen: set[fx.Node] = set()

    def join(self, start: fx.Node) -> None:
        """Adds a tensor and all that follows from it."""
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node not in self.seen:
                self.seen.add(node)
                waiting += self._sources(node)
                for user in node.users:
                    waiting += self._user(node, user)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """What a tensor of the stream is made of: more of the stream, or constants that write to it."""
        if node.target in (aten.linear.default, grouped_linear.target, aten.embedding.default):
            self._write(node)
            return []
        if node.target is aten.index.Tensor and (table := constant(node, 0, 1)) is not None:
            self.stream.writes.append(table)
            return []
        if (carried := _carried(node)) is not None:
            return [carried]
        if node.target is aten.add.Tensor:
            return [part for position in (0, 1) for part in self._summand(node, position)]
        raise _BlockedError(f"{describe(node)} makes a part of the residual stream and cannot be rotated")

    def _write(self, node: fx.Node) -> None:
        weights = {aten.embedding.default: [(0, 1)], grouped_linear.target: [(1, 2)]}
        for position, axis in weights.get(node.target, [(1, 0), (2, 0)]):
            if len(node.args) > position and node.args[position] is not None:
                operand = constant(node, position, axis)
                if operand is None:
                    raise _BlockedError(f"{describe(node)} reads a weight that is not constant")
                self.stream.writes.append(operand)

    def _summand(self, node: fx.Node, position: int) -> list[fx.Node]:
        part = node.args[position]
        if isinstance(part, fx.Node) and part.op == "get_attr" and part.meta["val"].dim() == 1:
            self.stream.writes.append(Operand(node, position, 0))
            return []
        if isinstance(part, fx.Node) and part.op == "call_function":
            return [part]
        raise _BlockedError(f"{describe(node)} adds a number to every channel of the residual stream")

    def _user(self, node: fx.Node, user: fx.Node) -> list[fx.Node]:
        """What a reader adds to the stream; a layer or a norm adds nothing, and is noted."""
        if user.target in SIZES:
            return []
        if user.target is aten.add.Tensor or _carried(user) is node:
            return [user]
        if user.target in (aten.linear.default, grouped_linear.target) and user.args[0] is node:
            operand = constant(user, 1, 1)
            if operand is not None:
                self.stream.reads.append(operand)
                return []
        if user.target in self.norms and user.args[0] is node and _one_axis(user):
            found = readers(user)
            if found:
                self.stream.norms[user] = [operand for _, operand in found]
                return []
        raise _BlockedError(f"{describe(user)} reads the residual stream channel by channel")


def _one_axis(norm: fx.Node) -> bool:
    return norm.target is not aten.layer_norm.default or len(norm.args[1]) == 1


def _carried(node: fx.Node) -> fx.Node | None:
    """The tensor whose tokens a call moves, sums or scales, with all their channels alike; None for other calls."""
    carried: Any = node.args[0] if node.args else None
    if node.target in PER_TOKEN:
        return carried if keeps_channels(node) else None
    if node.target is aten.sum.dim_IntList:
        rank, dims = carried.meta["val"].dim(), node.args[1]
        return carried if all(dim % rank != rank - 1 for dim in dims) else None
    if node.target is aten.mul.Tensor:
        for one, other in (node.args[:2], node.args[1::-1]):
            if isinstance(one, fx.Node) and one.op == "call_function" and _one_per_token(other):
                return one
    return None


def _one_per_token(factor: Any) -> bool:
    if not isinstance(factor, fx.Node):
        return True
    value = factor.meta["val"]
    return value.dim() == 0 or value.shape[-1] == 1
