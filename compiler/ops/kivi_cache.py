"""Keys per channel and values per token in 2 or 4 bits, behind a window that is not rounded (KIVI).

Liu et al. 2024, arXiv:2402.02750. Of n tokens so far the newest lie in a residual of R slots in floating point:

    keys      tokens from n // R * R on; R of them leave together, in groups of G tokens, each channel with a scale
    values    the last R tokens; the oldest leaves when a new one comes, in groups of G channels, each with a scale

Codes are asymmetric: code = round((x - zero) / scale) with zero = min and scale = (max - min) / (2^bits - 1) of the
group, both float16. New tokens read the past as it was before they came, and each other as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op


@op
def kivi_read(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    residual: Tensor,
    new: Tensor,
    positions: Tensor,
    keys: int,
    bits: int,
    group_size: int,
    per_channel: bool,
) -> Tensor:
    """Keys or values of all tokens: rounded ones, the residual, and the new ones.

    Args:
        codes: uint8 [B, Hkv, C + 1, D * bits / 8]; a token lies in the slot of its position.
        scale: float16, per channel [B, Hkv, C / G, D], else [B, Hkv, C + 1, D / G].
        zero: like `scale`.
        residual: [B, Hkv, R + 1, D]; position p lies in slot p % R.
        new: [B, Hkv, S, D].
        positions: int64 [B, S], consecutive in each row; -1 for padding on either side.
        keys: T, slots that may be in use, those of the new tokens included.
        bits: 2 or 4.
        group_size: G.
        per_channel: groups lie along tokens, else along channels.

    Returns:
        [B, Hkv, T, D] in the dtype of `new`; what no token lies in holds anything.
    """
    width, window = new.shape[3], residual.shape[2] - 1
    before, _, first = token_spans(positions)
    slots = torch.arange(keys, device=new.device)[None]
    levels = packing.unpack(codes[:, :, :keys], f"int{bits}", width).float()
    if per_channel:
        groups = slots[0] // group_size
        steps, lowest = scale[:, :, groups].float(), zero[:, :, groups].float()
    else:
        steps, lowest = (part[:, :, :keys].float().repeat_interleave(group_size, -1) for part in (scale, zero))
    dense = (levels * steps + lowest).to(new.dtype)
    recent = residual[:, :, slots[0] % window]
    fresh = _taken(new, first + slots - before).transpose(1, 2)
    rounded = (slots < _boundary(before, window, per_channel))[:, None, :, None]
    return torch.where(rounded, dense, torch.where((slots < before)[:, None, :, None], recent, fresh))


@op(mutates=("codes", "scale", "zero", "residual"))
def kivi_update(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    residual: Tensor,
    new: Tensor,
    positions: Tensor,
    bits: int,
    group_size: int,
    per_channel: bool,
) -> None:
    """Puts new tokens in the residual, and rounds those that leave it; see `kivi_read`. Last slots are scratch."""
    window = residual.shape[2] - 1
    before, after, first = token_spans(positions)
    start, end = (_boundary(n, window, per_channel) for n in (before, after))
    if per_channel:
        # Whole groups, as many as may be full after this call.
        count = (new.shape[2] + group_size - 1) // group_size + window // group_size
        inside = torch.arange(group_size, device=new.device)[None, None]
        places = start[..., None] + torch.arange(count, device=new.device)[None, :, None] * group_size + inside
    else:
        places = start + torch.arange(new.shape[2], device=new.device)[None]
    ends, held, begin = (n.reshape(n.shape[0], *[1] * (places.dim() - 1)) for n in (end, before, first))
    old = _taken(residual, places % window)
    leaving = torch.where((places < held)[..., None, None], old, _taken(new, begin + places - held)).float()
    if per_channel:
        levels, steps, lowest = _rounded(leaving, bits, 2)
    else:
        levels, steps, lowest = _rounded(leaving.unflatten(-1, (-1, group_size)), bits, 4)
        levels = levels.flatten(-2)
    made = packing.pack(levels, f"int{bits}", new.shape[3])
    _put(codes, made, torch.where(places < ends, places, codes.shape[2] - 1))
    slots = torch.where(places < ends, places, scale.shape[2] - 1)
    if per_channel:
        full = places[:, :, 0] + group_size <= end
        slots = torch.where(full, places[:, :, 0] // group_size, scale.shape[2] - 1)
    _put(scale, steps, slots)
    _put(zero, lowest, slots)
    kept = (positions >= 0) & (positions >= after - window)
    _put(residual, new.transpose(1, 2), torch.where(kept, positions % window, window))


def token_spans(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens before and after this call, and the first column that is a token; each [B, 1]."""
    real = positions >= 0
    after = positions.amax(1, keepdim=True) + 1
    before = torch.minimum(torch.where(real, positions, 1 << 40).amin(1, keepdim=True), after)
    return before, after, real.int().argmax(1, keepdim=True)


def _boundary(tokens: Tensor, window: int, per_channel: bool) -> Tensor:
    """How many of the first tokens are rounded."""
    return tokens // window * window if per_channel else (tokens - window).clamp(min=0)


def _taken(source: Tensor, places: Tensor) -> Tensor:
    """Tokens at `places` [B, …] of a tensor [B, Hkv, L, D], as [B, …, Hkv, D]; places beyond it are clamped."""
    rows = torch.arange(source.shape[0], device=source.device).reshape(-1, *[1] * (places.dim() - 1))
    return source.transpose(1, 2)[rows, places.clamp(0, source.shape[2] - 1)]


def _put(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Writes [B, …, Hkv, D] to `slots` [B, …] of a tensor [B, Hkv, L, D]."""
    rows = torch.arange(cache.shape[0], device=cache.device).reshape(-1, *[1] * (slots.dim() - 1))
    cache.transpose(1, 2).index_put_((rows, slots), new.to(cache.dtype))


def _rounded(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of float32 groups whose members lie along `dim`, and float16 scales and zeros without that dimension."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.half()
    # Codes are made with what is stored; a constant group gets any step.
    step = ((high - low) / (2**bits - 1)).half().clamp_min(torch.finfo(torch.float16).tiny)
    levels = ((x - zero.float()) / step.float()).round().clamp(0, 2**bits - 1)
    return levels, step.squeeze(dim), zero.squeeze(dim)


@kivi_update.fake
def _fake(codes: Tensor, *_rest: object, **_more: object) -> None:
    return None


@kivi_read.cost
def _read_cost(
    codes: TensorInfo, scale: TensorInfo, zero: TensorInfo, residual: TensorInfo, new: TensorInfo, *_rest: object
) -> Cost:
    return Cost(flops=16 // int(_rest[2]) * codes.numel, bytes=codes.bytes + 2 * scale.bytes + residual.bytes)  # type: ignore[call-overload]


@kivi_update.cost
def _update_cost(
    codes: TensorInfo, scale: TensorInfo, zero: TensorInfo, residual: TensorInfo, new: TensorInfo, *_rest: object
) -> Cost:
    return Cost(flops=8 * new.numel, bytes=3 * new.bytes)


def _state(dtype: torch.dtype, per_channel: bool) -> tuple[Tensor, ...]:
    groups = (2, 2, 5, 8) if per_channel else (2, 2, 17, 2)
    codes = torch.zeros(2, 2, 17, 2, dtype=torch.uint8)
    return (codes, *(torch.zeros(groups, dtype=torch.float16) for _ in range(2)), torch.zeros(2, 2, 9, 8, dtype=dtype))


@kivi_update.samples
def _update_samples(dtype: torch.dtype) -> Iterator[Sample]:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [-1, -1, 0, 1, 2, 3, 4, 5, 6]])
    for per_channel in (True, False):
        new = torch.randn(2, 2, 9, 8, dtype=dtype)
        yield Sample((*_state(dtype, per_channel), new, positions, 2, 4, per_channel), note=f"channel {per_channel}")


@kivi_read.samples
def _read_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _update_samples(dtype):
        kivi_update(*sample.args)
        state, (_, _, *options) = sample.args[:4], sample.args[4:]
        new = torch.randn(2, 2, 1, 8, dtype=dtype)
        yield Sample((*state, new, torch.tensor([[9], [7]]), 10, *options), note=sample.note)
