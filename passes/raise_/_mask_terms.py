"""A bias taken apart: which of its additive terms are masks, and which are not.

    split(program, bias, is_mask)       # [Leaf(mask, "allowed"), Leaf(relative_position_bias, "added")]

A fill under a condition (`where`, `masked_fill`) with a number that masks is the condition, beside what it fills.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphwright.match import argument
from graphwright.passes.raise_._attention_parts import MASKING, constant
from graphwright.program import Program

aten = torch.ops.aten

Kind = Literal["allowed", "hidden", "additive", "added"]


@dataclass(frozen=True)
class Leaf:
    """One term of a bias.

    A mask says by True what is `allowed`, or what is `hidden`, or it is `additive`: zeros and numbers that mask.
    Anything else is `added`.
    """

    node: fx.Node
    kind: Kind

    def allowed(self, value: Tensor) -> Tensor:
        """What a mask lets through, from the node's value."""
        if self.kind == "allowed":
            return value.bool()
        if self.kind == "hidden":
            return ~value.bool()
        return value > MASKING


def masks_only(value: Tensor) -> bool:
    """Whether a value consists of zeros and numbers that mask."""
    return value.is_floating_point() and bool(((value == 0) | (value <= MASKING)).all())


def split(program: Program, node: fx.Node, is_mask: Callable[[fx.Node], bool]) -> list[Leaf]:
    """The terms of `node`; `is_mask` says whether a node's values are those of a mask."""
    parts = _parts(program, node)
    if parts is not None:
        leaves, rest = parts
        return leaves + [leaf for part in rest for leaf in split(program, part, is_mask)]
    return [Leaf(node, "additive" if is_mask(node) else "added")]


def _parts(program: Program, node: fx.Node) -> tuple[list[Leaf], list[fx.Node]] | None:
    """The masks that `node` applies itself, and the terms that it goes on with; None if it is a term."""
    target = node.target
    if target is aten.add.Tensor and argument(node, "alpha") == 1:
        rest = node.args[:2]
        return ([], list(rest)) if all(isinstance(n, fx.Node) for n in rest) else None
    if target is aten.expand.default or (target is aten.to.dtype and _is_float(node.args[0])):
        return [], [node.args[0]]  # type: ignore[list-item]
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        filled, mask, number = node.args
        return _filled(program, mask, filled, number, "hidden")
    if target in (aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf):
        mask, one, other = node.args
        return _filled(program, mask, one, other, "allowed") or _filled(program, mask, other, one, "hidden")
    return None


def _filled(
    program: Program, mask: Any, filled: Any, number: Any, kind: Kind
) -> tuple[list[Leaf], list[fx.Node]] | None:
    fill, base = constant(program, number), constant(program, filled)
    if fill is None or fill > MASKING:
        return None
    if base == 0:
        return [Leaf(mask, kind)], []
    return ([Leaf(mask, kind)], [filled]) if isinstance(filled, fx.Node) else None


def _is_float(node: Any) -> bool:
    return bool(node.meta["val"].is_floating_point())
