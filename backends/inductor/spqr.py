"""SpQR's linear layer for Inductor: the codes become a weight in memory at every call, so it saves bytes, not time."""

from torch import Tensor
from torch.nn import functional

from graphwright.ops.spqr_linear import dense_part, merged, sparse_product


def spqr_by_parts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    statistics: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    *layout: int | str,
) -> Tensor:
    """One token: the dense product, and the corrections apart."""
    dense = dense_part(weight, scale, zero_point, statistics, *layout)[:, : x.shape[-1]]
    return functional.linear(x, dense.to(x.dtype), bias) + sparse_product(x, values, columns, starts)


def spqr_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    statistics: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    *layout: int | str,
) -> Tensor:
    """Many tokens: the corrections are added to the weight, then one matrix product."""
    dense = dense_part(weight, scale, zero_point, statistics, *layout)[:, : x.shape[-1]]
    return functional.linear(x, merged(dense, values, columns, starts).to(x.dtype), bias)
