"""A limit on the tokens that one expert takes; choices beyond it are dropped, and counted.

Lepikhin et al. 2020, GShard, arXiv:2006.16668; Fedus et al. 2021, Switch Transformers, arXiv:2101.03961.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def expert_capacity(
    weights: Tensor,
    indices: Tensor,
    num_experts: int,
    capacity: int = 0,
    factor: float = 0.0,
    round_up: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the first choices of each expert, within a sequence, and drops those beyond its capacity.

    All first choices of a sequence come before all second ones, and earlier tokens before later ones.

    Args:
        weights: [..., S, J], floating point.
        indices: int64 [..., S, J]; -1 where nothing is chosen.
        num_experts: E.
        capacity: tokens of a sequence that an expert takes; 0: what `factor` says.
        factor: the capacity as a multiple of S * J / E, what each expert would take if all took the same.
        round_up: round that capacity up, not down.

    Returns:
        weights with 0 and indices with -1 in the place of dropped choices, and int64 [E], how many choices of each
        expert were dropped.

    Raises:
        ValueError: there is no capacity.
    """
    limit = capacity_of(weights.shape[-2] * weights.shape[-1], num_experts, capacity, factor, round_up)
    length, top_k = indices.shape[-2:]
    ordered = indices.transpose(-1, -2).flatten(-2)
    chosen = ordered.unsqueeze(-1) == torch.arange(num_experts, device=indices.device)
    place = (chosen.cumsum(-2) * chosen).sum(-1)
    over = place > limit
    dropped = (chosen & over.unsqueeze(-1)).flatten(0, -2).sum(0)
    lost = over.unflatten(-1, (top_k, length)).transpose(-1, -2)
    return weights.masked_fill(lost, 0.0), indices.masked_fill(lost, -1), dropped


def capacity_of(choices: Any, num_experts: int, capacity: int, factor: float, round_up: bool) -> Any:
    """Tokens that an expert takes of a sequence with so many choices; in whole numbers, also of symbols.

    Raises:
        ValueError: there is no capacity.
    """
    if capacity < 0 or factor < 0 or (capacity == 0) == (factor == 0):
        raise ValueError(f"capacity is {capacity} and factor is {factor:g}; one of them must be positive")
    if capacity:
        return capacity
    part = ratio(factor)
    counted = choices * part.numerator
    return -(-counted // (part.denominator * num_experts)) if round_up else counted // (part.denominator * num_experts)


def ratio(factor: float) -> Fraction:
    """A factor as it was meant, so that kernels and reference round alike."""
    return Fraction(factor).limit_denominator(4096)


@expert_capacity.fake
def _fake(weights: Tensor, indices: Tensor, num_experts: int, *_rest: object, **_more: object):  # type: ignore[no-untyped-def]
    return torch.empty_like(weights), torch.empty_like(indices), indices.new_empty(num_experts)


@expert_capacity.cost
def _cost(weights: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=4 * weights.numel)


@expert_capacity.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((2, 9, 2), (5, 1), (1, 3)):
        weights, indices = torch.rand(shape, dtype=dtype), torch.randint(0, 4, shape)
        yield Sample((weights, indices, 4, 2), note=f"two tokens of {shape}")
        yield Sample((weights, indices, 4, 0, 1.25), note=f"a quarter more than equal shares of {shape}")
        yield Sample((weights, indices.masked_fill(indices == 0, -1), 4, 0, 1.0, False), note=f"rounded down, {shape}")
