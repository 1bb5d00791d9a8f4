"""Repeated key-value heads are read where they are: grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    before                                          after
    k = reshape(expand(unsqueeze(k, 2)))            y = attention(q, k, v)
    v = repeat_interleave(v, n, dim=1)
    y = attention(q, k, v)              [B, H, T, D]                       k, v: [B, Hkv, T, D]

Query head h reads key-value head h * Hkv // H, so only copies that lie side by side are absorbed; heads that are
tiled (0 1 0 1) are not. Copies made before rope, a cast or a change of layout are found behind it. With a cache the
difference is a factor of H / Hkv in its size.
"""

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.match import argument
from graphwright.ops import attention, rope
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.raise_._attention_parts import rank, shape
from graphwright.program import Program
from graphwright.rewrite import Editor, describe

aten = torch.ops.aten

MERGES = {aten.reshape.default, aten.flatten.using_ints}
EXPANSIONS = {aten.expand.default, aten.broadcast_to.default}


class RaiseGroupedHeads(Pass):
    """Removes copies of key-value heads in front of attention."""

    name = "raise_grouped_heads"
    kind = "exact"
    paper = Paper("GQA: Training Generalized Multi-Query Transformer Models", "Ainslie et al.", 2023, "2305.13245")
    requires = ("attention",)
    after = ("rope",)
    provides = ("grouped_heads",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Absorbs copies where both key and value have them, the same number of times."""
        misses = []
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.calls(attention.target):
                key, value = (copies(node.args[i], 1) for i in (1, 2))
                if key is None and value is None:
                    continue
                if key is None or value is None or key.heads != value.heads:
                    misses.append(f"{describe(node)}: its keys and values are not repeated alike")
                elif editor.allow(node):
                    parts = (_without(editor, part, node) for part in (key, value))
                    new = editor.call(attention, node.args[0], *parts, *node.args[3:], before=node, **node.kwargs)
                    editor.replace(node, new, f"{key.heads} key-value heads")
        return PassResult(program, editor.sites, misses)


@dataclass(frozen=True)
class Copies:
    """Heads that are copied side by side, and what happens to the copies afterwards."""

    source: fx.Node
    heads: str
    """How many heads the source has."""
    squeeze: int | None
    """A dimension of size 1 that the source has on top, or None."""
    later: tuple[fx.Node, ...]
    """Calls between the copies and the attention that treat every head alike, the last one first."""


def copies(node: fx.Node, axis: int) -> Copies | None:
    """The copying of heads, dimension `axis` of `node`, that `node` comes from."""
    later: list[fx.Node] = []
    while node.op == "call_function":
        found = _copied(node, axis)
        if found is not None:
            source, heads, squeeze = found
            return Copies(source, heads, squeeze, tuple(later))
        if node.target is aten.transpose.int:
            dims: list[int] = [dim % rank(node) for dim in node.args[1:]]  # type: ignore[misc]
            axis = dims[1 - dims.index(axis)] if axis in dims else axis
        elif node.target is aten.permute.default:
            axis = argument(node, "dims")[axis] % rank(node)
        elif node.target not in (aten.to.dtype, rope.target) and not _is_idle_reshape(node):
            return None
        later.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return None


def _copied(node: fx.Node, axis: int) -> tuple[fx.Node, str, int | None] | None:
    """Source, its heads, and its dimension to squeeze, if `node` is the copying itself."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], torch.Tensor):
        return None
    if node.target in MERGES and source.target in EXPANSIONS:
        return _expanded(node, source, axis)
    if node.target is aten.repeat_interleave.self_int and argument(node, "dim") in (axis, axis - rank(node)):
        return source, shape(source)[axis], None
    one_head = rank(source) == rank(node) and shape(source)[axis] == "1" and shape(node)[axis] != "1"
    if node.target in (*EXPANSIONS, aten.repeat.default) and one_head and _same_but(source, node, axis):
        return source, "1", None
    return None


def _expanded(node: fx.Node, expanded: fx.Node, axis: int) -> tuple[fx.Node, str, int | None] | None:
    """The form [.., Hkv, 1, ..] > [.., Hkv, n, ..] > [.., Hkv * n, ..]."""
    source: fx.Node = expanded.args[0]  # type: ignore[assignment]
    if rank(source) != rank(expanded) or rank(expanded) != rank(node) + 1:
        return None
    before, after, merged = shape(source), shape(expanded), shape(node)
    if before[axis + 1] != "1" or not _same_but(source, expanded, axis + 1):
        return None
    if after[:axis] != merged[:axis] or after[axis + 2 :] != merged[axis + 1 :]:
        return None
    if source.target is aten.unsqueeze.default and argument(source, "dim") % rank(source) == axis + 1:
        return source.args[0], before[axis], None  # type: ignore[return-value]
    return source, before[axis], axis + 1


def _same_but(one: fx.Node, other: fx.Node, axis: int) -> bool:
    pairs = enumerate(zip(shape(one), shape(other), strict=True))
    return all(a == b for dim, (a, b) in pairs if dim != axis)


def _is_idle_reshape(node: fx.Node) -> bool:
    return node.target is aten.reshape.default and shape(node) == shape(node.args[0])


def _without(editor: Editor, found: Copies, before: fx.Node) -> fx.Node:
    """The heads as they are without the copying, after all that happens to them later."""
    node = found.source
    if found.squeeze is not None:
        node = editor.call(aten.squeeze.dim, node, found.squeeze, before=before)
    for later in reversed(found.later):
        if not _is_idle_reshape(later):
            node = editor.call(later.target, node, *later.args[1:], before=before, **later.kwargs)
    return node
