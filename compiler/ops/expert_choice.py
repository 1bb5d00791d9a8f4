"""Experts that choose their tokens: each takes those with the highest scores, and all take the same number.

Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368. Which tokens an expert takes depends
on all tokens of the sequence, also later ones, so a causal model that chooses so does not generate what it computes
over a whole text.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.ops.expert_capacity import capacity_of


@op
def expert_choice(
    logits: Tensor, capacity: int = 0, factor: float = 0.0, round_up: bool = True
) -> tuple[Tensor, Tensor]:
    """Lets every expert take tokens of a sequence by their softmax over the experts.

    Args:
        logits: [..., S, E], floating point.
        capacity: tokens that each expert takes, or all where there are fewer; 0: what `factor` says.
        factor: the capacity as a multiple of S / E, which is the mean number of experts per token.
        round_up: round that capacity up, not down; an expert takes one token at least.

    Returns:
        weights float32 [..., S, E], 0 where the expert of that column did not take the token, and indices int64
        [..., S, E], the number of the column or -1.

    Raises:
        ValueError: there is no capacity.
    """
    length, experts = logits.shape[-2:]
    limit = capacity_of(length, experts, capacity, factor, round_up)
    scores = logits.float().softmax(-1)
    # An expert's k-th best token is found by ranks, because k may depend on the length.
    order = scores.sort(dim=-2, descending=True, stable=True).indices
    places = torch.arange(length, device=order.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(-2, order, places)
    taken = rank < torch.sym_max(limit, 1)
    numbers = torch.arange(experts, device=order.device).expand_as(order)
    return scores * taken, torch.where(taken, numbers, -1)


@expert_choice.fake
def _fake(logits: Tensor, *_rest: object, **_more: object):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, dtype=torch.float32), torch.empty_like(logits, dtype=torch.int64)


@expert_choice.cost
def _cost(logits: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=16 * logits.numel)


@expert_choice.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((2, 9, 4), (7, 3), (1, 5)):
        logits = torch.randn(shape, dtype=dtype)
        yield Sample((logits, 0, 2.0), note=f"two experts for each of {shape}")
        yield Sample((logits, 2), note=f"two tokens of {shape}")
