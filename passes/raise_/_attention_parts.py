"""What the readers of attention and masks share: shapes as text, constants, and the terms of a bias."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.errors import PassError
from graphwright.program import Program
from graphwright.rewrite import run_nodes

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default}

MASKING = -1e4
"""Scores lowered by this much or more are masked: exp(-1e4) is zero in every dtype."""


class RefusedError(Exception):
    """A chain that looks like attention and is not understood."""


@dataclass(frozen=True)
class Term:
    """Something added to the scores.

    Without `fill`, `factor * node`. With it `node` is a bool mask, and `fill` replaces scores where it is `where`.
    """

    node: fx.Node
    rank: int
    """Rank of the scores that it was added to: 4, or 3 where batch and heads are merged."""
    factor: float = 1.0
    fill: float | None = None
    where: bool = True


def shape(node: fx.Node) -> tuple[str, ...]:
    """The sizes of a node as text, so that symbolic ones compare without adding guards."""
    return tuple(str(size) for size in node.meta["val"].shape)


def rank(node: fx.Node) -> int:
    """The number of dimensions of a node's value."""
    return len(node.meta["val"].shape)


def constant(program: Program, value: Any) -> float | None:
    """A number, or the number that a node without inputs always has; None for anything else."""
    if not isinstance(value, fx.Node):
        return None if value is None or isinstance(value, bool) else float(value)
    fake = value.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.dim() != 0:
        return None
    try:
        return float(run_nodes(program, [value], {})[0])
    except PassError:
        return None


def is_last(node: fx.Node, dim: int) -> bool:
    """Whether `dim` is the last dimension of a node's value."""
    return dim in (-1, rank(node) - 1)


def merges_heads(node: fx.Node) -> bool:
    """Whether a reshape leaves the last two dimensions alone: [B, H, S, T] to or from [B*H, S, T]."""
    source = node.args[0]
    return shape(node)[-2:] == shape(source)[-2:]
