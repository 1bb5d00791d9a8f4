"""A linear layer whose weight is stored in low-bit codes; layout in `graphwright.packing`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op


@op
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """X @ dequantize(weight).T + bias, in the dtype of `x`.

    Args:
        x: [..., K], floating point.
        weight: packed codes of [N, K padded to groups].
        scale: [N, G], float16 or float32.
        zero_point: [N, G] in codes, float32 offsets for an offset format, or None for a symmetric weight.
        bias: [N] or None.
        format: a name in `packing.FORMATS`.
        group_size: weights that share a scale along K; K itself (or more) for one scale per row.

    Returns:
        [..., N].
    """
    dense = packing.dequantize(weight, scale, zero_point, format, group_size)
    return functional.linear(x, dense[:, : x.shape[-1]].to(x.dtype), bias)


@quantized_linear.fake
def _fake(x: Tensor, weight: Tensor, *_rest: object, **_more: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@quantized_linear.cost
def _cost(x: TensorInfo, weight: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=2 * x.numel * weight.shape[0])


@quantized_linear.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for format, group_size, asymmetric in (
        ("int8", 96, False),
        ("int4", 32, False),
        ("int4", 32, True),
        ("int4", 64, True),
        ("int8", 64, True),
        ("int3", 32, True),
        ("int2", 32, False),
        ("nf4", 64, False),
        ("mxfp4", 32, False),
        ("fp8_e4m3", 96, False),
        ("int4_offset", 32, True),
    ):
        for rows in ((1, 1), (2, 5), (3, 1)):
            features, outputs = 96, 40
            groups = -(-features // group_size)
            low, high = packing.FORMATS[format].low, packing.FORMATS[format].high
            # The largest codes of an 8-bit floating-point format are not numbers.
            highest = 100 if format.startswith("fp8") else high
            codes = torch.randint(low, highest + 1, (outputs, groups * group_size))
            scale = torch.rand(outputs, groups) * 0.1
            zero = torch.randint(low, high + 1, (outputs, groups)).float() if asymmetric else None
            bias = torch.randn(outputs, dtype=dtype) if rows == (2, 5) else None
            weight = packing.pack(codes, format, group_size)
            x = torch.randn(*rows, features, dtype=dtype)
            note = f"{format}, group {group_size}, asymmetric {asymmetric}, rows {rows}"
            yield Sample((x, weight, scale, zero, bias, format, group_size), note=note)
