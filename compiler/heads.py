"""The heads of an attention: which rows of which projections make each, and what they may be turned by.

    found, misses = attention_heads(program)
    found[0].key.rows                 # int64 [Hkv, D]: rows of `found[0].key.maker`, a linear layer
    found[0].basis.pairs              # channels that rope turns together

Everything is found by sending row numbers through the graph, so separate, merged and interleaved projections are one
case; see `graphwright.folding`. What is between a projection and its attention is replayed when heads are rebuilt.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.dependency import PASSING
from graphwright.evaluate import shape_at
from graphwright.folding import PROBE, REARRANGING, SIZES, Rows
from graphwright.match import argument
from graphwright.ops import attention, rms_norm, rope
from graphwright.ops.attention import OPTIONS
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

NORMS = {rms_norm.target, aten.layer_norm.default}


@dataclass(frozen=True)
class Projection:
    """Where the heads of a query, key or value come from.

    Attributes:
        maker: the linear layer.
        rows: int64 [heads, D], its row behind each channel of each head.
        between: what is done to heads [B, heads, S, D] on the way, in that order; reshapes are left out.
        batch: the size of the batch, as the graph says it.
    """

    maker: fx.Node
    rows: Tensor
    between: tuple[fx.Node, ...]
    batch: Any


@dataclass(frozen=True)
class Basis:
    """Which bases of query and key give the same scores.

    Attributes:
        pairs: int64 [F, 2], channels that rope turns together: a rotation of the pair commutes with it.
        free: int64 [n], channels that nothing stands between: any rotation among them does.

    Channels in neither are fixed.
    """

    pairs: Tensor
    free: Tensor


@dataclass(frozen=True)
class Heads:
    """One attention with its projections.

    Attributes:
        name: of the weight that makes the keys.
        node: the attention.
        query: H heads.
        key: Hkv heads.
        value: Hkv heads.
        reader: the linear layer that reads the result.
        columns: int64 [H, Dv], the reader's column of each channel of each head.
        basis: of query and key.
        value_free: whether nothing stands between the values and their projection.
    """

    name: str
    node: fx.Node
    query: Projection
    key: Projection
    value: Projection
    reader: fx.Node
    columns: Tensor
    basis: Basis
    value_free: bool

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return len(self.key.rows)

    @property
    def share(self) -> int:
        """Query heads per key-value head."""
        return len(self.query.rows) // len(self.key.rows)


def attention_heads(program: Program) -> tuple[list[Heads], list[str]]:
    """The heads of every attention whose projections can be followed, and why others cannot."""
    found, misses = [], []
    for node in program.calls(attention.target):
        try:
            found.append(_heads(program, node))
        except _UnknownHeadsError as reason:
            misses.append(f"{node.name}: {reason}")
    return found, misses


def _heads(program: Program, node: fx.Node) -> Heads:
    query, key, value = (_projection(program, node.args[place]) for place in range(3))
    if query.maker.args[0] is not key.maker.args[0] or key.maker.args[0] is not value.maker.args[0]:
        raise _UnknownHeadsError("queries, keys and values are made from different tensors")
    bias = argument(node, "bias")
    if bias is not None and shape_at(program, bias, program.contract.sizes(PROBE))[-3:-2] != (1,):
        raise _UnknownHeadsError("a bias differs between heads")
    for name in ("alibi_slopes", "sinks"):
        constant = argument(node, name)
        if constant is not None and constant.op != "get_attr":
            raise _UnknownHeadsError(f"its {name} are computed")
    reader, columns = _reader(program, node)
    name = str(key.maker.args[1].target)
    return Heads(name, node, query, key, value, reader, columns, _basis(program, query, key), not _bound(value))


def _projection(program: Program, source: fx.Node) -> Projection:
    between: list[fx.Node] = []
    batch: Any = None
    node: Any = source
    while not _is_linear(node):
        if node.target in PASSING or node.target is aten.to.dtype:
            _refuse_foreign(node)
            between.append(node)
        elif node.target not in REARRANGING:
            raise _UnknownHeadsError(f"{node.name} stands between a projection and attention")
        elif node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            batch = node.args[1][0]
        node = node.args[0]
    if node.meta["val"].dim() != 3 or batch is None or batch == -1:
        raise _UnknownHeadsError(
            f"{node.name} does not make tokens [batch, sequence, channels] that are cut into heads"
        )
    values = Rows(program, node, PASSING).at(source)
    if values is None or not (values == values[:1, :, :1]).all():
        raise _UnknownHeadsError(f"the rows of {node.name} cannot be followed")
    return Projection(node, values[0, :, 0].contiguous(), tuple(reversed(between)), batch)


def _refuse_foreign(node: fx.Node) -> None:
    """Refuses what cannot be replayed on heads in another order."""
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], (int, float)):
        raise _UnknownHeadsError(f"{node.name} multiplies heads by a tensor")
    if node.target in NORMS and node.meta["val"].dim() != 4:
        raise _UnknownHeadsError(f"{node.name} normalizes over heads")


def _basis(program: Program, query: Projection, key: Projection) -> Basis:
    head_dim, none = query.rows.shape[1], torch.zeros(0, dtype=torch.long)
    steps = [*query.between, *key.between]
    ropes = [node for node in steps if node.target is rope.target]
    if not ropes and not any(node.target in NORMS for node in steps):
        return Basis(none.view(0, 2), torch.arange(head_dim))
    kinds = {(str(argument(node, "inv_freq")), bool(argument(node, "interleaved"))) for node in ropes}
    if len(ropes) != 2 or len(kinds) != 1 or any(node.target in NORMS for node in steps):
        return Basis(none.view(0, 2), none)
    half = int(argument(ropes[0], "inv_freq").meta["val"].shape[0])
    interleaved = argument(ropes[0], "interleaved")
    channels = torch.arange(2 * half)
    pairs = channels.view(half, 2) if interleaved else channels.view(2, half).t()
    return Basis(pairs, torch.arange(2 * half, head_dim))


def _bound(side: Projection) -> bool:
    return any(node.target in NORMS or node.target is rope.target for node in side.between)


def _reader(program: Program, node: fx.Node) -> tuple[fx.Node, Tensor]:
    """The linear layer that reads an attention's result, and its columns by head."""
    batch, heads, length, width = shape_at(program, node, program.contract.sizes(PROBE))
    numbers = Rows(program, node, PASSING)
    numbers.known[node] = torch.arange(heads * width).view(1, heads, 1, width).expand(batch, -1, length, -1)
    current = node
    while True:
        users = [user for user in current.users if user.target not in SIZES]
        if len(users) != 1:
            raise _UnknownHeadsError(f"{current.name} has {len(users)} readers")
        if _is_linear(users[0]) and users[0].args[0] is current:
            break
        current = users[0]
        if current.target not in REARRANGING:
            raise _UnknownHeadsError(f"{current.name} stands between attention and its projection")
    columns = numbers.of(current)
    if columns is None or len(columns.unique()) != heads * width or len(columns) != heads * width:
        raise _UnknownHeadsError("the output projection does not read each head once")
    return users[0], columns.argsort().view(heads, width)


def _is_linear(node: fx.Node) -> bool:
    if node.target is not aten.linear.default:
        return False
    return all(isinstance(a, fx.Node) and a.op == "get_attr" for a in node.args[1:] if a is not None)


def options_of(node: fx.Node) -> dict[str, Any]:
    """The options of an attention that are set, without tensors."""
    given = {name: argument(node, name) for name in OPTIONS}
    return {name: value for name, value in given.items() if value or name in ("scale", "causal")}


def rebuild(editor: Editor, side: Projection, name: str, heads: int, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A projection of its own for `heads` heads, with all that was done to heads behind it.

    Args:
        editor: of the program.
        side: what the new projection stands in for.
        name: of the new weights, which are zeros.
        heads: how many.
        before: where to put it.

    Returns:
        The linear layer, whose row h * D + d makes channel d of head h, and the heads [B, heads, S, D].
    """
    maker, head_dim = side.maker, side.rows.shape[1]
    old = editor.program.weight(maker.args[1])
    stored = [editor.weight(name, old.new_zeros(heads * head_dim, old.shape[1]), before)]
    if len(maker.args) > 2 and maker.args[2] is not None:
        stored.append(editor.weight(f"{name}_bias", old.new_zeros(heads * head_dim), before))
    linear = editor.call(aten.linear.default, maker.args[0], *stored, before=before)
    node = editor.call(aten.reshape.default, linear, [side.batch, -1, heads, head_dim], before=before)
    node = editor.call(aten.transpose.int, node, 1, 2, before=before)
    for step in side.between:
        node = editor.call(step.target, node, *step.args[1:], before=before, **step.kwargs)
    return linear, node


class _UnknownHeadsError(Exception):
    """Why an attention's heads cannot be rebuilt."""
