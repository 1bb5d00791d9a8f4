"""Cache entries as indices of a codebook, with the outliers of each token kept apart (KVQuant).

Hooper et al. 2024, arXiv:2401.18079. A token's entry in one cache is the vector of all its heads, W = Hkv * D:

    x = center + reach * codebook[code]            but the `outliers` largest deviations, which are stored as float16

Keys have a center and a reach for each channel, from calibration, so that a token can be encoded as it comes; those of
values are the range of the token itself, outliers left out. Where the paper's sparse part has any number of entries,
here every token has the same, which makes it a dense state.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op


@op
def kvquant_encode(
    x: Tensor, center: Tensor | None, reach: Tensor | None, codebook: Tensor, outliers: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of each token, its range, and its outliers.

    Args:
        x: [B, Hkv, S, D].
        center: float32 [Hkv * D], the middle of each channel; None for the middle of each token.
        reach: float32 [Hkv * D], half of each channel's range; None with `center`.
        codebook: float32 [2^bits], ascending, within [-1, 1].
        outliers: K, entries of a token that are stored apart.
        bits: 2, 3 or 4.

    Returns:
        codes uint8 [B, 1, S, W * bits / 8], (center, reach) float16 [B, 1, S, 2] of the token (zeros where channels
        have theirs), outliers float16 [B, 1, S, K], and where they are, int16 [B, 1, S, K].
    """
    flat = x.transpose(1, 2).flatten(2).float()
    if center is not None and reach is not None:
        scaled = (flat - center) / reach
        places = scaled.abs().topk(outliers, -1).indices
        ranges = torch.zeros_like(flat[..., :2])
    else:
        places = (flat - flat.median(-1, keepdim=True).values).abs().topk(outliers, -1).indices
        apart = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, places, True)
        low = flat.masked_fill(apart, float("inf")).amin(-1, keepdim=True)
        high = flat.masked_fill(apart, float("-inf")).amax(-1, keepdim=True)
        smallest = torch.finfo(torch.float16).tiny
        ranges = torch.cat([(low + high) / 2, ((high - low) / 2).clamp_min(smallest)], -1).half().float()
        scaled = (flat - ranges[..., :1]) / ranges[..., 1:]
    codes = torch.bucketize(scaled, (codebook[1:] + codebook[:-1]) / 2)
    kept = flat.gather(-1, places)
    made = (packing.pack(codes, f"int{bits}", flat.shape[-1]), ranges.half(), kept.half(), places.to(torch.int16))
    return made[0][:, None], made[1][:, None], made[2][:, None], made[3][:, None]


@op
def kvquant_decode(
    codes: Tensor,
    ranges: Tensor | None,
    outliers: Tensor,
    places: Tensor,
    center: Tensor | None,
    reach: Tensor | None,
    codebook: Tensor,
    bits: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> Tensor:
    """The inverse of `kvquant_encode`, [B, Hkv, T, D]; `ranges` is None where channels have theirs."""
    width = codes.shape[-1] * 8 // bits
    levels = codebook[packing.unpack(codes[:, 0], f"int{bits}", width).int()]
    if center is not None and reach is not None:
        dense = levels * reach + center
    elif ranges is not None:
        dense = levels * ranges[:, 0, :, 1:].float() + ranges[:, 0, :, :1].float()
    else:
        dense = levels
    dense = dense.scatter(-1, places[:, 0].long(), outliers[:, 0].float())
    return dense.unflatten(-1, (kv_heads, -1)).transpose(1, 2).to(dtype)


@kvquant_encode.cost
def _cost(x: TensorInfo, center: TensorInfo | None, reach: object, codebook: object, outliers: int, bits: int) -> Cost:
    return Cost(flops=8 * x.numel, bytes=x.bytes + x.numel * bits // 8)


@kvquant_encode.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    channels = (torch.randn(16), torch.rand(16) + 0.5)
    for bits in (2, 3, 4):
        codebook = torch.linspace(-1, 1, 2**bits)
        for center, reach in (channels, (None, None)):
            x = torch.randn(2, 2, 3, 8, dtype=dtype)
            yield Sample((x, center, reach, codebook, 2, bits), note=f"{bits} bits, channels {center is not None}")


@kvquant_decode.cost
def _inverse_cost(codes: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=8 * codes.numel)


@kvquant_decode.samples
def _inverse_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _samples(torch.float32):
        _, center, reach, codebook, _, bits = sample.args
        codes, ranges, *apart = kvquant_encode(*sample.args)
        held = (codes, ranges if center is None else None, *apart)
        yield Sample((*held, center, reach, codebook, bits, 2, dtype), note=sample.note)
