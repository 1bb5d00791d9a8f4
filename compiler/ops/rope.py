"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float = 1.0, interleaved: bool = False) -> Tensor:
    """Rotates pairs of channels of `x` by position * inv_freq; the table is computed in float32.

    Args:
        x: [B, H, S, D].
        positions: int64 [B|1, S].
        inv_freq: float32 [R/2], R <= D even; channels R … D-1 pass unchanged (partial rotary).
        scaling: factor on cosine and sine (YaRN's attention temperature, arXiv:2309.00071).
        interleaved: pairs are (2i, 2i+1) as in GPT-J and DeepSeek; else (i, i + R/2) as in Llama and NeoX.

    Returns:
        The shape and dtype of `x`.
    """
    angles = positions[:, None, :, None].float() * inv_freq.float()
    cos, sin = (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)
    rotary = 2 * inv_freq.shape[0]
    turning, passing = x[..., :rotary], x[..., rotary:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., : rotary // 2], turning[..., rotary // 2 :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([rotated, passing], -1)


@rope.cost
def _cost(x: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=3 * x.numel)


@rope.fake
def _fake(x: Tensor, *_rest: object, **_more: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@rope.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for heads, length, head_dim, rotary in (
        (3, 7, 64, 64),
        (1, 1, 80, 80),
        (2, 5, 96, 24),
        (2, 3, 8, 2),
    ):
        inv_freq = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
        x = torch.randn(2, heads, length, head_dim, dtype=dtype)
        positions = torch.randint(0, 2000, (2, length))
        for interleaved in (False, True):
            note = f"head_dim {head_dim}, rotary {rotary}, interleaved {interleaved}"
            yield Sample((x, positions, inv_freq, 1.0, interleaved), note=note)
    yield Sample((x, positions[:1], inv_freq, 1.2079), note="shared positions, YaRN temperature")
