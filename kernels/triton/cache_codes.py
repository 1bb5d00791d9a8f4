"""Keys and values into caches of low-bit codes, and out of any cache for a prompt.

A token's head is rounded as `graphwright.ops.quantize_tokens` does, rotated before where it is a key, and lies in
rows (Sheng et al. 2023, arXiv:2303.06865) or in blocks found through a table (Kwon et al. 2023, arXiv:2309.06180). A
single step reads codes where they lie (`decode_attention`). A prompt reads every key once per block of queries, so
`read` gives them in floating point, once, to `flash_attention`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright import packing
from graphwright.errors import BackendError
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    cdiv,
    check_device,
    dense,
    fixed,
    meta,
    next_power_of_2,
    strides,
)
from graphwright.kernels.triton.rounding import decode_e4m3, encode_e4m3, round_half_even, sine_and_cosine

FORMATS = ("int8", "int4", "fp8_e4m3")
"""Formats that are written and read."""


@triton.jit
def load_rotated(
    source, position, inv_freq_ptr, scaling, channel, present,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Channels of some tokens [T, C] in float32, rotated, and rounded to the dtype that they were in."""
    inside = present[:, None] & (channel < HEAD_DIM)[None, :]
    x = tl.load(source[:, None] + channel[None, :], mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if ROTARY > 0:
        if INTERLEAVED:
            pair, first = channel // 2, channel % 2 == 0
            partner = tl.where(first, channel + 1, channel - 1)
        else:
            pair, first = channel % (ROTARY // 2), channel < ROTARY // 2
            partner = tl.where(first, channel + ROTARY // 2, channel - ROTARY // 2)
        turning = channel < ROTARY
        other = tl.load(source[:, None] + partner[None, :], mask=inside & turning[None, :], other=0.0).to(tl.float32)
        angle = position[:, None] * tl.load(inv_freq_ptr + pair, mask=turning, other=0.0)[None, :]
        sine, cosine = sine_and_cosine(angle)
        # The reference rounds the table to the dtype of the activations.
        cosine = (cosine * scaling).to(x.dtype).to(tl.float32)
        sine = (sine * scaling).to(x.dtype).to(tl.float32)
        turned = wide * cosine + tl.where(first[None, :], -other, other) * sine
        wide = tl.where(turning[None, :], turned.to(x.dtype).to(tl.float32), wide)
    return wide


@triton.jit
def codes_of(x, scale, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """Codes in int32 of float32 `x` [T, C] by a scale [T]; symmetric integers, or bits of e4m3."""
    scaled = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST * 1.0), LARGEST * 1.0)
    if FP8:
        codes = encode_e4m3(scaled)
    else:
        codes = round_half_even(scaled).to(tl.int32)
    return codes


@triton.jit
def slot_offset(slot, table_ptr, batch, pages, step_b, step_t, stored, PAGE: tl.constexpr):
    """Where slots [T] of a row lie, and which of them lie anywhere: in a row of their own, or in blocks."""
    if PAGE > 0:
        block = tl.load(table_ptr + batch * pages + slot // PAGE, mask=stored & (slot // PAGE < pages), other=-1)
        stored = stored & (block >= 0)
        place = block.to(tl.int64) * step_b + (slot % PAGE) * step_t
    else:
        place = batch * step_b + slot * step_t
    return place, stored


@triton.jit
def quantize_and_store(
    x_ptr, positions_ptr, inv_freq_ptr, slots_ptr, table_ptr, codes_ptr, scale_ptr,
    heads, length, pages, x_b, x_h, x_s, positions_b, codes_b, codes_h, codes_t, scale_b, scale_h, scale_t, scaling,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, FP8: tl.constexpr, LARGEST: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head, rotated, rounded, and written to their slots; of 4-bit codes both halves at once."""
    batch_head = tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < length
    slot = tl.load(slots_ptr + batch * length + token, mask=present, other=-1)
    stored = present & (slot >= 0)
    source = x_ptr + batch * x_b + head * x_h + token.to(tl.int64) * x_s
    position = token.to(tl.float32)
    if ROTARY > 0:
        position = tl.load(positions_ptr + batch * positions_b + token, mask=present, other=0).to(tl.float32)
    channel = tl.arange(0, BLOCK_D)
    width: tl.constexpr = HEAD_DIM * BITS // 8
    low = load_rotated(source, position, inv_freq_ptr, scaling, channel, present, HEAD_DIM, ROTARY, INTERLEAVED)
    if BITS == 4:
        low = tl.where((channel < width)[None, :], low, 0.0)
        high = load_rotated(
            source, position, inv_freq_ptr, scaling, channel + width, present, HEAD_DIM, ROTARY, INTERLEAVED
        )
        largest = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    else:
        largest = tl.max(tl.abs(low), axis=1)
    # A token of zeros has no scale of its own; any will do, and this is the reference's.
    scale = tl.maximum(tl.math.div_rn(largest, LARGEST * 1.0), 1.1754943508222875e-38)
    codes = codes_of(low, scale, LARGEST, FP8)
    if BITS == 4:
        codes = (codes + 8) | ((codes_of(high, scale, LARGEST, FP8) + 8) << 4)
    place, kept = slot_offset(slot, table_ptr, batch, pages, codes_b, codes_t, stored, PAGE)
    target = codes_ptr + head * codes_h + place[:, None] + channel[None, :]
    tl.store(target, codes.to(codes_ptr.dtype.element_ty), mask=kept[:, None] & (channel < width)[None, :])
    place, kept = slot_offset(slot, table_ptr, batch, pages, scale_b, scale_t, stored, PAGE)
    tl.store(scale_ptr + head * scale_h + place, scale, mask=kept)


@triton.jit
def load_codes(ptr, at, channel, mask, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Codes as float32: at element offsets `at` of a row of bytes, for 8 bits, or two codes to a byte, for 4.

    Bytes without a sign are bits of e4m3, which GPUs that have the type are given in the type itself.
    """
    if BITS == 4:
        # Both nibbles of a byte are wanted; the second load finds it in the first-level cache.
        byte = tl.load(ptr + at + channel % (WIDTH // 2), mask=mask, other=0).to(tl.int32)
        codes = ((byte >> (channel // (WIDTH // 2) * 4)) & 15).to(tl.float32)
    elif ptr.dtype.element_ty == tl.uint8:
        codes = decode_e4m3(tl.load(ptr + at + channel, mask=mask, other=0).to(tl.int32))
    else:
        codes = tl.load(ptr + at + channel, mask=mask, other=0.0).to(tl.float32)
    return codes


@triton.jit
def read_tokens(
    source_ptr, scale_ptr, table_ptr, out_ptr,
    heads, keys, pages, source_b, source_h, source_t, scale_b, scale_h, scale_t,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some slots of one head, out of their blocks and in floating point."""
    batch_head = tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    slot = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    present = slot < keys
    channel = tl.arange(0, BLOCK_D)
    place, known = slot_offset(slot, table_ptr, batch, pages, source_b, source_t, present, PAGE)
    mask = known[:, None] & (channel < HEAD_DIM)[None, :]
    at = (head * source_h + place)[:, None]
    if BITS > 0:
        x = load_codes(source_ptr, at, channel[None, :], mask, BITS, HEAD_DIM)
        if BITS == 4:
            x -= 8.0
        place, known = slot_offset(slot, table_ptr, batch, pages, scale_b, scale_t, present, PAGE)
        x *= tl.load(scale_ptr + head * scale_h + place, mask=known, other=0.0)[:, None]
    else:
        x = tl.load(source_ptr + at + channel[None, :], mask=mask, other=0.0)
    target = out_ptr + (batch_head.to(tl.int64) * keys + slot)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, x.to(out_ptr.dtype.element_ty), mask=present[:, None] & (channel < HEAD_DIM)[None, :])


def update(
    run: Runner,
    codes: Tensor,
    scale: Tensor,
    x: Tensor,
    slots: Tensor,
    table: Tensor | None,
    format: str,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Writes `quantize_tokens(rope(x))` into a cache; entries without a slot or a block are not written at all.

    Args:
        run: runs the launches.
        codes: [B, Hkv, C, D * bits / 8] in the format's storage, or blocks [N, Hkv, block, D * bits / 8]; written.
        scale: float32, like `codes` with a last dimension of 1; written.
        x: [B, Hkv, S, D], floating point.
        slots: int64 [B, S], negative for padding.
        table: int64 [B, M], the blocks of each row, negative where there is none; None for caches in rows.
        format: one of `FORMATS`.
        positions: int64 [B|1, S] for keys that are not rotated yet, else None.
        inv_freq: float32 [R / 2], as `graphwright.ops.rope` has it, else None.
        scaling: of the rotated channels.
        interleaved: whether channels are turned in neighbouring pairs.

    Raises:
        BackendError: a format without a kernel, or tensors on several devices.
    """
    _require(format)
    check_device(codes=codes, scale=scale, x=x, slots=slots, table=table, positions=positions)
    batch, heads, length, head_dim = x.shape
    kind, source = packing.FORMATS[format], dense(x)
    rotary = 0 if inv_freq is None else 2 * inv_freq.shape[0]
    block = max(16, next_power_of_2(codes.shape[3]))
    run(
        Launch(
            quantize_and_store,
            {
                "x_ptr": source, "positions_ptr": None if positions is None else positions.contiguous(),
                "inv_freq_ptr": None if inv_freq is None else inv_freq.float().contiguous(),
                "slots_ptr": slots.contiguous(), "table_ptr": None if table is None else table.contiguous(),
                "codes_ptr": codes, "scale_ptr": scale, "heads": heads, "length": length,
                "pages": 0 if table is None else table.shape[1], "scaling": float(scaling),
                "positions_b": 0 if positions is None or positions.shape[0] == 1 else length,
                **strides("x", source, "bhs"), **strides("codes", codes, "bht"), **strides("scale", scale, "bht"),
            },
            {
                "HEAD_DIM": head_dim, "ROTARY": rotary, "INTERLEAVED": interleaved,
                "PAGE": 0 if table is None else codes.shape[2], "BITS": kind.bits, "FP8": kind.dtype is not None,
                "LARGEST": int(kind.largest),
            },
            tuple(Config.of(4, BLOCK_TOKENS=tokens, BLOCK_D=block) for tokens in (1, 4, 16)),
            lambda c: (cdiv(length, c["BLOCK_TOKENS"]), batch * heads),
            lambda c: Work(30 * c["BLOCK_TOKENS"] * head_dim, c["BLOCK_TOKENS"] * head_dim * (x.element_size() + 1)),
            static=fixed(head_dim, "x_b", "x_h", "x_s") | fixed(codes.shape[3], "codes_b", "codes_h", "codes_t"),
        )
    )  # fmt: skip


def read(
    run: Runner, source: Tensor, scale: Tensor | None, table: Tensor | None, keys: int, format: str, dtype: torch.dtype
) -> Tensor:
    """The first `keys` slots of every row in floating point, [B, Hkv, keys, D]; zeros where there is no block.

    Args:
        run: runs the launches.
        source: codes as in `update`, or the cache itself in floating point.
        scale: as in `update`; None for floating point.
        table: as in `update`.
        keys: slots to read.
        format: one of `FORMATS`, or empty for floating point.
        dtype: of the result.

    Raises:
        BackendError: a format without a kernel, or tensors on several devices.
    """
    if format:
        _require(format)
    check_device(source=source, scale=scale, table=table)
    heads, batch = source.shape[1], source.shape[0] if table is None else table.shape[0]
    bits = packing.FORMATS[format].bits if format else 0
    head_dim = source.shape[3] * 8 // bits if bits else source.shape[3]
    held = in_fp8(source, format, run)
    out = torch.empty(batch, heads, keys, head_dim, dtype=dtype, device=source.device)
    steps = strides("scale", scale, "bht") if scale is not None else {"scale_b": 0, "scale_h": 0, "scale_t": 0}
    block = max(16, next_power_of_2(head_dim))
    run(
        Launch(
            read_tokens,
            {
                "source_ptr": held, "scale_ptr": scale, "table_ptr": None if table is None else table.contiguous(),
                "out_ptr": out, "heads": heads, "keys": keys, "pages": 0 if table is None else table.shape[1],
                **strides("source", held, "bht"), **steps,
            },
            {"HEAD_DIM": head_dim, "PAGE": 0 if table is None else source.shape[2], "BITS": bits},
            tuple(Config.of(4, BLOCK_TOKENS=tokens, BLOCK_D=block) for tokens in (16, 4, 32)),
            lambda c: (cdiv(keys, c["BLOCK_TOKENS"]), batch * heads),
            lambda c: Work(4 * c["BLOCK_TOKENS"] * head_dim, c["BLOCK_TOKENS"] * head_dim * (dtype.itemsize + 1)),
            static=fixed(source.shape[3], "source_b", "source_h", "source_t"),
        )
    )  # fmt: skip
    return out


def in_fp8(codes: Tensor, format: str, run: Runner) -> Tensor:
    """Bits of e4m3 as that type where the device converts it; the kernels decode bits themselves elsewhere."""
    return codes.view(torch.float8_e4m3fn) if format == "fp8_e4m3" and run.device.fp8 else codes


def _require(format: str) -> None:
    if format not in FORMATS:
        raise BackendError(f"No kernel reads or writes caches in {format}", fix=f"There are {', '.join(FORMATS)}")


def _written(run: Runner, dtype: torch.dtype, format: str, paged: bool = False) -> None:
    kind = packing.FORMATS[format]
    rows = (512, 8, 16) if paged else (4, 8, 1025)
    update(
        run, meta(kind.storage, *rows, 128 * kind.bits // 8), meta(torch.float32, *rows, 1),
        meta(dtype, 4, 512, 8, 128).transpose(1, 2), meta(torch.int64, 4, 512),
        meta(torch.int64, 4, 64) if paged else None, format, meta(torch.int64, 4, 512), meta(torch.float32, 64),
    )  # fmt: skip


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "int8 keys": lambda run, dtype: _written(run, dtype, "int8"),
    "int4 keys, paged": lambda run, dtype: _written(run, dtype, "int4", paged=True),
    "fp8 keys": lambda run, dtype: _written(run, dtype, "fp8_e4m3"),
    "read int4": lambda run, dtype: read(
        run, meta(torch.uint8, 4, 8, 1025, 64), meta(torch.float32, 4, 8, 1025, 1), None, 1000, "int4", dtype
    ),
    "read pages": lambda run, dtype: read(
        run, meta(dtype, 512, 8, 16, 128), None, meta(torch.int64, 4, 64), 1000, "", dtype
    ),
}
