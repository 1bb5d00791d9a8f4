"""Rounding of cache entries to codes with one scale per token and head, and back."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op

FORMATS = ("int8", "int4", "fp8_e4m3")
"""Formats of `graphwright.packing` that a cache may have."""


@op
def quantize_tokens(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """The nearest codes of x / scale, with scale = max|x| / largest code over the last dimension.

    Args:
        x: [..., D], floating point; D a multiple of the format's unit.
        format: one of `FORMATS`.

    Returns:
        codes [..., D * bits / 8] in the format's storage, scale float32 [..., 1].
    """
    kind, wide = packing.FORMATS[format], x.float()
    # A token of zeros has no scale of its own; any will do.
    scale = (wide.abs().amax(-1, keepdim=True) / kind.largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (wide / scale).clamp(-kind.largest, kind.largest)
    return packing.pack(packing.encode(scaled, format), format, x.shape[-1]), scale


@op
def dequantize_tokens(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_tokens`, up to its rounding.

    Args:
        codes: [..., D * bits / 8].
        scale: float32 [..., 1].
        format: one of `FORMATS`.
        dtype: of the result.

    Returns:
        [..., D].
    """
    width = codes.shape[-1] * 8 // packing.FORMATS[format].bits
    return (packing.decode(packing.unpack(codes, format, width), format) * scale).to(dtype)


@quantize_tokens.cost
def _cost(x: TensorInfo, format: str) -> Cost:
    return Cost(flops=4 * x.numel, bytes=x.bytes + x.numel * packing.FORMATS[format].bits // 8)


@quantize_tokens.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for format in FORMATS:
        yield Sample((torch.randn(2, 3, 5, 16, dtype=dtype), format), note=format)
    yield Sample((torch.zeros(1, 1, 1, 8, dtype=dtype), "int8"), note="zeros")


@dequantize_tokens.cost
def _inverse_cost(codes: TensorInfo, scale: TensorInfo, format: str, dtype: torch.dtype) -> Cost:
    return Cost(flops=2 * codes.numel * 8 // packing.FORMATS[format].bits, bytes=codes.bytes + scale.bytes)


@dequantize_tokens.samples
def _inverse_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for format in FORMATS:
        codes, scale = quantize_tokens(torch.randn(2, 3, 5, 16), format)
        yield Sample((codes, scale, format, dtype), note=format)
