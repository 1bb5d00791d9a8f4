"""Matrix products of consecutive groups of rows with one weight per group, as dropless mixtures of experts need them.

Gale et al. 2022, MegaBlocks, arXiv:2211.15841.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y[i] = x[i] @ weight[e] for the group e that row i lies in.

    Args:
        x: [M, K], rows sorted by group.
        weight: [E, K, N].
        ends: int32 [E], the row after the last one of each group, not decreasing; rows past the last end yield zeros.

    Returns:
        [M, N] in the dtype of `x`.
    """
    result = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            result[start:end] = x[start:end] @ weight[expert]
        start = end
    return result


@grouped_linear.fake
def _fake(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_linear.cost
def _cost(x: TensorInfo, weight: TensorInfo, ends: TensorInfo) -> Cost:
    return Cost(flops=2 * x.numel * weight.shape[2])


@grouped_linear.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    x, weight = torch.randn(10, 16, dtype=dtype), torch.randn(4, 16, 24, dtype=dtype)
    yield Sample((x, weight, torch.tensor([3, 3, 9, 10], dtype=torch.int32)), note="an empty expert")
    yield Sample((x[:1], weight, torch.tensor([0, 1, 1, 1], dtype=torch.int32)), note="one row")
