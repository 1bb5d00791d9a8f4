"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False) -> Tensor:
    """X / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32.

    Args:
        x: [..., K].
        weight: [K], or None for no gain.
        eps: added to the mean square.
        unit_offset: the gain is 1 + weight, multiplied in float32 (Gemma); else weight, multiplied in the
            dtype of `x`, as Llama does.

    Returns:
        The shape and dtype of `x`.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return (normed.to(x.dtype) * weight).to(x.dtype)


@rms_norm.fake
def _fake(x: Tensor, *_rest: object, **_more: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@rms_norm.cost
def _cost(x: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=5 * x.numel)


@rms_norm.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((2, 3, 8), (1, 1, 576), (5, 7), (2, 4, 3, 80)):
        weight = torch.randn(shape[-1], dtype=dtype)
        yield Sample((torch.randn(shape, dtype=dtype), weight, 1e-6), note=f"shape {shape}")
    yield Sample(
        (torch.randn(2, 5, 96, dtype=dtype), torch.randn(96, dtype=dtype), 1e-5, True),
        note="1 + weight",
    )
    yield Sample((torch.randn(2, 5, 96, dtype=dtype), None, 1e-5), note="no gain")
    yield Sample((torch.zeros(1, 4, dtype=dtype), torch.ones(4, dtype=dtype), 1e-6), note="zero row")
    yield Sample(
        (torch.full((1, 4), 3e4, dtype=dtype), torch.ones(4, dtype=dtype), 1e-6),
        note="x² overflows fp16",
    )
