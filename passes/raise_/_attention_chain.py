"""Reading an attention out of a graph: what `raise_attention` knows of its spellings.

    found = read(program, node)         # node: a scaled_dot_product_attention, or the product of weights and values
    if isinstance(found, Chain): ...    # else None (no attention), or the reason why this one is not understood

Nothing is edited here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.match import argument
from graphwright.passes.raise_._attention_parts import (
    SDPA,
    RefusedError,
    Term,
    is_last,
    merges_heads,
    rank,
    shape,
)
from graphwright.passes.raise_._attention_scores import Reader, Scores
from graphwright.program import Program

aten = torch.ops.aten

SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}


@dataclass(frozen=True)
class Chain:
    """One attention: softmax(softcap(scale * query @ key) + terms, with sinks) @ value."""

    root: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    softcap: float = 0.0
    causal: bool = False
    transposed: bool = False
    """The key lies as [.., D, T]."""
    terms: tuple[Term, ...] = ()
    sinks: fx.Node | None = None


def read(program: Program, node: fx.Node) -> Chain | str | None:
    """The attention whose result is `node`; a reason against it; None if `node` is something else."""
    try:
        if node.target is SDPA:
            return _sdpa(node)
        softmax, sliced = _weights(node)
        if softmax is None:
            return None
        return _written_out(program, node, softmax, sliced)
    except RefusedError as refusal:
        return str(refusal)


def _sdpa(node: fx.Node) -> Chain:
    query, key, value, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    if argument(node, "dropout_p"):
        raise RefusedError("its dropout is active")
    scale = argument(node, "scale")
    if scale is None:
        scale = int(query.meta["val"].shape[-1]) ** -0.5
    terms: tuple[Term, ...] = ()
    if mask is not None:
        is_bool = mask.meta["val"].dtype == torch.bool
        terms = (Term(mask, rank(query), fill=float("-inf") if is_bool else None, where=False),)
    return Chain(node, query, key, value, float(scale), causal=bool(argument(node, "is_causal")), terms=terms)


def _written_out(program: Program, root: fx.Node, softmax: fx.Node, sliced: bool) -> Chain:
    """The chain from `root` down to the product of query and key."""
    product, scores = Reader(program).scores(softmax.args[0], Scores())
    if (scores.sinks is not None) != sliced:
        raise RefusedError("a column of its weights is cut off, or added, and not the other")
    return Chain(
        root, product.args[0], product.args[1], root.args[1], scores.factor, scores.softcap,
        transposed=True, terms=scores.terms[::-1], sinks=scores.sinks,
    )  # fmt: skip


def _weights(root: fx.Node) -> tuple[fx.Node | None, bool]:
    """The softmax whose weights `root` multiplies with the values, and whether a last column is cut off.

    Raises:
        RefusedError: something happens to the weights on the way.
    """
    node: Any = root.args[0]
    passed, sliced = [], False
    while isinstance(node, fx.Node) and node.target not in SOFTMAXES:
        passed.append(node)
        if node.target is aten.slice.Tensor and not sliced:
            start, end, step = (argument(node, name) for name in ("start", "end", "step"))
            if is_last(node, argument(node, "dim")) and not start and end == -1 and step == 1:
                sliced = True
                node = node.args[0]
                continue
        if node.target is aten.dropout.default and _ends_in_softmax(node.args[0]):
            raise RefusedError("its dropout is active")
        if node.target not in (aten.to.dtype, aten.reshape.default, aten.expand.default):
            return None, False
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None, False
    if not is_last(node, argument(node, "dim")):
        raise RefusedError("its softmax runs over another dimension than the keys")
    if any(len(user.users) > 1 for user in (*passed, node)):
        raise RefusedError("its weights are used elsewhere")
    if any(n.target is aten.expand.default and shape(n) != shape(n.args[0]) for n in passed):
        raise RefusedError("its weights are broadcast")
    if any(n.target is aten.reshape.default and not merges_heads(n) for n in passed):
        raise RefusedError("its weights are reshaped")
    return node, sliced


def _ends_in_softmax(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target in (aten.to.dtype, aten.reshape.default, aten.slice.Tensor):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in SOFTMAXES
