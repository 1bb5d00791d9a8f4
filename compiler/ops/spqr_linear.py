"""A linear layer in SpQR's layout: low-bit codes whose scales and zero points are codes too, and sparse corrections.

Dettmers et al. 2023, arXiv:2306.03078. The scales of the weight's groups form a matrix [G, N] that is itself stored as
`graphwright.packing` lays out a weight, with groups of `statistic_group` outputs; so do the zero points. A weight that
rounds badly has what is missing, in float16, in a matrix of compressed sparse rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op

FEW_TOKENS = 8
"""Up to so many tokens the reference multiplies the corrections apart; for more it adds them to the weight first."""


@op
def spqr_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    statistics: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    statistic_format: str,
    statistic_group: int,
) -> Tensor:
    """X @ (dequantize(weight) + sparse).T + bias, in the dtype of `x`.

    Args:
        x: [..., K], floating point.
        weight: packed codes of [N, K padded to groups].
        scale: packed codes of [G, N padded to groups of `statistic_group`].
        zero_point: as `scale`.
        statistics: floating point [4, G, N / `statistic_group`]: scale and zero point of the scales, then of the
            zero points.
        values: float16 [M], what the codes of M weights lack, row by row.
        columns: int16 or int32 [M], where along K they are.
        starts: int32 [N + 1], the first of each row's values, and M.
        bias: [N] or None.
        format: of the weight, a name in `packing.FORMATS`.
        group_size: weights that share a scale along K.
        statistic_format: of the scales and zero points.
        statistic_group: outputs whose scales share a scale.

    Returns:
        [..., N].
    """
    parts = (weight, scale, zero_point, statistics, format, group_size, statistic_format, statistic_group)
    dense = dense_part(*parts)[:, : x.shape[-1]]
    if x.numel() > FEW_TOKENS * x.shape[-1]:
        return functional.linear(x, merged(dense, values, columns, starts).to(x.dtype), bias)
    return functional.linear(x, dense.to(x.dtype), bias) + sparse_product(x, values, columns, starts)


def dense_part(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    statistics: Tensor,
    format: str,
    group_size: int,
    statistic_format: str,
    statistic_group: int,
) -> Tensor:
    """What the codes stand for, without the corrections: float32 [N, K padded]."""
    rows = weight.shape[0]
    wide_scale = packing.dequantize(scale, statistics[0], statistics[1], statistic_format, statistic_group)
    wide_zero = packing.dequantize(zero_point, statistics[2], statistics[3], statistic_format, statistic_group)
    grids = (wide_scale[:, :rows].t(), wide_zero[:, :rows].t())
    return packing.dequantize(weight, *grids, format, group_size)


def merged(dense: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """The weight with its corrections added, float32 [N, K]; `dense` [N, K] stays as it is."""
    places = (rows_of(columns, starts), columns.long())
    return dense.index_put(places, values.float(), accumulate=True)


def sparse_product(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """X @ sparse.T for few tokens: [..., N] in the dtype of `x`."""
    products = x[..., columns.long()].float() * values.float()
    sums = products.new_zeros((*x.shape[:-1], starts.shape[0] - 1))
    return sums.index_add(-1, rows_of(columns, starts), products).to(x.dtype)


def rows_of(columns: Tensor, starts: Tensor) -> Tensor:
    """The row of each value, int64 [M]."""
    return torch.searchsorted(starts, torch.arange(columns.shape[0], dtype=starts.dtype), right=True) - 1


@spqr_linear.fake
def _fake(x: Tensor, weight: Tensor, *_rest: object, **_more: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@spqr_linear.cost
def _cost(x: TensorInfo, weight: TensorInfo, *rest: TensorInfo, **_more: object) -> Cost:
    values = rest[3]
    return Cost(flops=2 * x.numel * weight.shape[0] + 2 * values.numel * x.numel / x.shape[-1])


@spqr_linear.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for rows, outputs, width, found in (((1, 1), 40, 96, 30), ((2, 5), 37, 90, 25), ((3, 7), 33, 64, 0)):
        groups, blocks = -(-width // 16), -(-outputs // 16)
        weight = packing.pack(torch.randint(0, 8, (outputs, groups * 16)), "int3", 16)
        scale, zero = (packing.pack(torch.randint(0, 8, (groups, blocks * 16)), "int3", 16) for _ in range(2))
        statistics = torch.rand(4, groups, blocks).half() * 0.1
        flat = torch.randperm(outputs * width)[:found].sort().values
        starts = torch.searchsorted(flat, torch.arange(outputs + 1) * width).int()
        sparse = (torch.randn(found).half(), (flat % width).short(), starts)
        bias = torch.randn(outputs, dtype=dtype) if rows == (2, 5) else None
        x = torch.randn(*rows, width, dtype=dtype)
        args = (x, weight, scale, zero, statistics, *sparse, bias, "int3", 16, "int3", 16)
        yield Sample(args, note=f"{found} corrections, rows {rows}")
