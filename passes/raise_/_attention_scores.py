"""The scores of a written-out attention, read from the softmax towards the product of query and key.

    product, scores = Reader(program).scores(softmax.args[0], Scores())

On the way factors, a soft cap, additive terms, fills under a mask and a column of sinks are noted, in whatever order
they come, as long as their meaning is that of `graphwright.ops.attention`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphwright.match import argument
from graphwright.passes.raise_._attention_parts import (
    MASKING,
    PRODUCTS,
    RefusedError,
    Term,
    constant,
    is_last,
    merges_heads,
    rank,
    shape,
)
from graphwright.program import Program
from graphwright.text import op_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Scores:
    """What has been read between the softmax and the current node."""

    factor: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    sinks: fx.Node | None = None


class Reader:
    """Reads the scores of one eager chain."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def scores(self, node: Any, seen: Scores) -> tuple[fx.Node, Scores]:
        """The product of query and key under `node`, and all that happens to it."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            raise RefusedError("its scores are no product of query and key")
        if node.target in PRODUCTS:
            return node, replace(seen, factor=seen.factor * (seen.softcap or 1.0))
        step = STEPS.get(node.target)
        if step is None:
            raise RefusedError(f"its scores go through {op_name(node.target)}")
        return step(self, node, seen)

    def _through(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        if node.target is not aten.to.dtype and not merges_heads(node):
            raise RefusedError("its scores are reshaped")
        return self.scores(node.args[0], seen)

    def _scaled(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        for one, other in ((0, 1), (1, 0)):
            factor = constant(self.program, node.args[other])
            if factor is not None and isinstance(node.args[one], fx.Node):
                return self.scores(node.args[one], replace(seen, factor=seen.factor * factor))
        raise RefusedError("its scores are multiplied with a tensor")

    def _divided(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        divisor = constant(self.program, node.args[1])
        if not divisor:
            raise RefusedError("its scores are divided by a tensor")
        return self.scores(node.args[0], replace(seen, factor=seen.factor / divisor))

    def _capped(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        if seen.softcap or seen.factor <= 0:
            raise RefusedError("its scores go through tanh twice")
        return self.scores(node.args[0], replace(seen, softcap=seen.factor, factor=1.0))

    def _added(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        _outside_cap(seen)
        if argument(node, "alpha") != 1:
            raise RefusedError("a bias is added with a factor")
        refusals = []
        for one, other in ((0, 1), (1, 0)):
            bias = node.args[other]
            if not isinstance(bias, fx.Node):
                return self.scores(node.args[one], seen)  # the softmax does not see a constant
            term = Term(bias, rank(node), seen.factor)
            try:
                return self.scores(node.args[one], replace(seen, terms=(*seen.terms, term)))
            except RefusedError as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def _shifted(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        _outside_cap(seen)
        if not _is_row_maximum(node.args[1], node.args[0]):
            raise RefusedError("something is subtracted from its scores")
        return self.scores(node.args[0], seen)

    def _filled(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        source, mask, value = node.args[:3]
        return self._masked(node, source, mask, value, True, seen)

    def _chosen(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        mask, one, other = node.args[:3]
        if constant(self.program, one) is not None:
            return self._masked(node, other, mask, one, True, seen)
        return self._masked(node, one, mask, other, False, seen)

    def _masked(
        self, node: fx.Node, source: Any, mask: Any, value: Any, where: bool, seen: Scores
    ) -> tuple[fx.Node, Scores]:
        _outside_cap(seen)
        fill = constant(self.program, value)
        if fill is None or fill * seen.factor > MASKING:
            raise RefusedError("its scores are replaced by something that does not mask them")
        term = Term(mask, rank(node), fill=fill * seen.factor, where=where)
        return self.scores(source, replace(seen, terms=(*seen.terms, term)))

    def _joined(self, node: fx.Node, seen: Scores) -> tuple[fx.Node, Scores]:
        parts: Any = node.args[0]
        if seen != Scores() or not is_last(node, argument(node, "dim")) or len(parts) != 2 or rank(node) != 4:
            raise RefusedError("its scores are joined with something")
        scores, sinks = parts
        while isinstance(sinks, fx.Node) and sinks.target in (aten.expand.default, aten.to.dtype):
            sinks = sinks.args[0]
        heads = shape(node)[1]
        if not isinstance(sinks, fx.Node) or shape(sinks) != ("1", heads, "1", "1"):
            raise RefusedError("its scores are joined with something that is not one number per head")
        return self.scores(scores, replace(seen, sinks=sinks))


STEPS: dict[Any, Any] = {
    aten.to.dtype: Reader._through,
    aten.reshape.default: Reader._through,
    aten.mul.Tensor: Reader._scaled,
    aten.mul.Scalar: Reader._scaled,
    aten.div.Tensor: Reader._divided,
    aten.div.Scalar: Reader._divided,
    aten.tanh.default: Reader._capped,
    aten.add.Tensor: Reader._added,
    aten.sub.Tensor: Reader._shifted,
    aten.masked_fill.Scalar: Reader._filled,
    aten.masked_fill.Tensor: Reader._filled,
    aten.where.self: Reader._chosen,
    aten.where.ScalarSelf: Reader._chosen,
    aten.where.ScalarOther: Reader._chosen,
    aten.cat.default: Reader._joined,
}
"""How to go on from each op that may stand between the softmax and the product of query and key."""


def _outside_cap(seen: Scores) -> None:
    if seen.softcap:
        raise RefusedError("its soft cap includes a bias or mask")


def _is_row_maximum(node: Any, of: Any) -> bool:
    if isinstance(node, fx.Node) and getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, fx.Node) or not isinstance(of, fx.Node) or node.args[0] is not of:
        return False
    if node.target not in (aten.max.dim, aten.amax.default):
        return False
    dim = argument(node, "dim")
    return is_last(of, dim[0] if isinstance(dim, (list, tuple)) else dim) and bool(argument(node, "keepdim"))
