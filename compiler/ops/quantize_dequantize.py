"""Rounding of activations to low-bit codes and back, so that a matrix product after it may run on the codes.

The graph keeps floating-point values, so it runs anywhere; a backend that has integer products matches this op in
front of `quantized_linear` and multiplies the codes instead. Layers that read the same activations share one node.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op

LARGEST = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
"""The largest magnitude per format of `graphwright.packing`; codes are symmetric."""


@op
def quantize_dequantize(x: Tensor, scale: Tensor | None, format: str, group_size: int) -> Tensor:
    """The value of `format` that is nearest to x / scale, times the scale, in the dtype of `x`.

    Args:
        x: [..., K], floating point.
        scale: [] (static, measured by calibration), or None: max|x| / largest code, per token and group.
        format: a name in `LARGEST`.
        group_size: activations that share a dynamic scale along K; 0 for one scale per token.

    Returns:
        The shape and dtype of `x`.
    """
    wide = x.float()
    grouped = wide.unflatten(-1, (-1, group_size)) if group_size else wide
    largest = LARGEST[format]
    if scale is None:
        # A token of zeros has no scale of its own; any will do.
        step = (grouped.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        step = scale.float()
    scaled = (grouped / step).clamp(-largest, largest)
    kind = packing.FORMATS[format]
    rounded = (scaled.round() if kind.dtype is None else scaled.to(kind.dtype).float()) * step
    return rounded.reshape(x.shape).to(x.dtype)


@quantize_dequantize.cost
def _cost(x: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=4 * x.numel)


@quantize_dequantize.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for group_size in (0, 32):
        for rows in ((1, 1), (2, 5)):
            yield Sample((torch.randn(*rows, 96, dtype=dtype), None, "int8", group_size), note=f"group {group_size}")
    for format in ("int4", "fp8_e4m3", "fp8_e5m2"):
        yield Sample((torch.randn(2, 3, 96, dtype=dtype), None, format, 0), note=format)
    yield Sample((torch.zeros(1, 2, 32, dtype=dtype), None, "int8", 0), note="zeros")
    yield Sample((torch.randn(2, 3, 32, dtype=dtype), torch.tensor(0.02), "int8", 0), note="static")
