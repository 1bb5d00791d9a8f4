"""Brings the chosen experts of a layer into memory, where their weights lie in a file and not all fit.

Yi et al. 2023, EdgeMoE, arXiv:2308.14352. In a graph the op says where this happens, which is right behind the router;
what is computed does not change. A backend whose weights are mapped from a file keeps the budget.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def fetch_experts(indices: Tensor, layer: int, share: float, budget: int = 0, guess: Tensor | None = None) -> Tensor:
    """The indices, once the experts that they name are on their way into memory.

    Args:
        indices: int64 [M, J], the choices of a layer.
        layer: its number, from 0 on.
        share: part of the bytes of all layers' experts that may be in memory at a time.
        budget: these bytes themselves, in the place of the share; 0 for none.
        guess: int64 [M, J], what the next layer is likely to choose; or None.

    Returns:
        int64 [M, J].
    """
    return indices.clone()


@fetch_experts.cost
def _cost(indices: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(bytes=2 * indices.bytes)


@fetch_experts.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    indices = torch.randint(0, 8, (5, 2))
    yield Sample((indices, 0, 0.25), note="a quarter in memory")
    yield Sample((indices, 1, 0.0, 1 << 20, indices[:, :1]), note="a guess for the next layer")
