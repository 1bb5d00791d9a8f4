"""A linear layer whose weight is stored without its zeros; layouts in `graphwright.sparsity`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing, sparsity
from graphwright.op import Cost, Sample, TensorInfo, op


@op
def sparse_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    layout: str,
    format: str,
    group_size: int,
    outputs: int,
) -> Tensor:
    """X @ expand(values, places).T + bias, in the dtype of `x`.

    Args:
        x: [..., K], floating point.
        values: of layout `2:4`: [N, 2, K / 4], or packed codes of [2 N, K / 4]; of `bitmask`: [non-zeros].
        places: of layout `2:4`: uint8 [N, K / 4]; of `bitmask`: uint8 [N, ceil(K / 8)].
        scale: [N, G], float16 or float32, or None for floating-point values.
        zero_point: [N, G] in codes, or None.
        bias: [N] or None.
        layout: `2:4` or `bitmask`.
        format: a name in `packing.FORMATS`, or empty for floating-point values.
        group_size: columns of the dense weight that share a scale, a multiple of four.
        outputs: N.

    Returns:
        [..., N].
    """
    if layout == "bitmask":
        return functional.linear(x, sparsity.from_bitmask(values, places, x.shape[-1]).to(x.dtype), bias)
    if format:
        zeros = None if zero_point is None else zero_point.repeat_interleave(2, 0)
        plain = packing.dequantize(values, scale.repeat_interleave(2, 0), zeros, format, group_size // 4)
        values = plain.unflatten(0, (-1, 2))
    return functional.linear(x, sparsity.expand(values, places).to(x.dtype), bias)


@sparse_linear.fake
def _fake(x: Tensor, *rest: object, **_more: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


@sparse_linear.cost
def _cost(x: TensorInfo, values: TensorInfo, places: TensorInfo, *rest: object, **_more: object) -> Cost:
    # What a kernel that skips zeros does; the eager reference multiplies the dense weight.
    outputs = rest[-1]
    share = x.numel * outputs
    return Cost(flops=share if rest[3] == "2:4" else 2 * share)


@sparse_linear.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for rows in ((1, 1), (2, 5)):
        x, bias = torch.randn(*rows, 96, dtype=dtype), torch.randn(40, dtype=dtype) if rows == (2, 5) else None
        weight = torch.randn(40, 96, dtype=dtype)
        halved = weight * sparsity.Pattern(2, 4).keep(weight.abs().float(), 0.5)
        values, places = sparsity.compress(halved)
        yield Sample((x, values, places, None, None, bias, "2:4", "", 0, 40), note=f"2:4, rows {rows}")
        for format in ("int8", "int4"):
            codes = torch.randint(*(packing.FORMATS[format].low, packing.FORMATS[format].high + 1), (80, 24))
            packed, scale = packing.pack(codes, format, 8), torch.rand(40, 3) * 0.1
            yield Sample((x, packed, places, scale, None, bias, "2:4", format, 32, 40), note=f"2:4 {format}")
        kept = weight * (torch.rand(40, 96) > 0.7)
        yield Sample((x, *sparsity.to_bitmask(kept), None, None, bias, "bitmask", "", 0, 40), note=f"bitmask {rows}")
