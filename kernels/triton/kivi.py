"""KIVI caches: tokens rounded into them, and read out of them; keys per channel, values per token, in 2 or 4 bits.

Liu et al. 2024, arXiv:2402.02750; the layout is that of `graphwright.ops.kivi_cache`. A token lies in one of three
places: its codes, the residual in floating point, or the tensor of new tokens, which are put away only after they were
read. `load_tokens` looks it up where it lies, so attention over the cache (`kivi_attention`) reads two bits a number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from graphwright.kernels.triton.rounding import round_half_even

BITS = (2, 4)
LARGEST_GROUP = 256
"""Tokens or channels that share a scale, at most: a block holds whole groups."""

NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
"""Above every position and every column."""

SMALLEST_STEP: tl.constexpr = tl.constexpr(6.103515625e-05)
"""The smallest normal float16."""


@dataclass(frozen=True)
class Side:
    """Keys or values of a layer.

    Attributes:
        codes: uint8 [B, Hkv, C + 1, D * bits / 8].
        scale: float16, per channel [B, Hkv, groups, D], else [B, Hkv, C + 1, D / group_size].
        zero: like `scale`.
        residual: [B, Hkv, R + 1, D].
        new: [B, Hkv, S, D], not put away yet.
        bits: 2 or 4.
        group_size: tokens or channels that share a scale.
        per_channel: whether groups lie along tokens.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    residual: Tensor
    new: Tensor
    bits: int
    group_size: int
    per_channel: bool

    def check(self) -> None:
        """Refuses what no kernel reads.

        Raises:
            BackendError: bits, groups or a head that do not fit, or a cache with gaps.
        """
        dim = self.new.shape[3]
        if self.bits not in BITS or not 0 < self.group_size <= LARGEST_GROUP:
            raise BackendError(
                f"No kernel reads KIVI codes of {self.bits} bits in groups of {self.group_size}",
                fix=f"There are kernels for 2 and 4 bits, in groups of up to {LARGEST_GROUP}",
            )
        if dim * self.bits % 8 or (not self.per_channel and dim % self.group_size):
            raise BackendError(f"Heads of {dim} are not cut into groups of {self.group_size} and whole bytes")
        if not all(part.is_contiguous() for part in (self.codes, self.scale, self.zero, self.residual)):
            raise BackendError("A KIVI cache is not contiguous", fix="Allocate each of its tensors on its own")
        check_device(codes=self.codes, scale=self.scale, zero=self.zero, residual=self.residual, new=self.new)

    def arguments(self, prefix: str) -> dict[str, Any]:
        """What kernels take of it, with names that begin alike."""
        source = dense(self.new)
        return {
            f"{prefix}_codes_ptr": self.codes, f"{prefix}_scale_ptr": self.scale, f"{prefix}_zero_ptr": self.zero,
            f"{prefix}_residual_ptr": self.residual, f"{prefix}_new_ptr": source,
            f"{prefix}_slots": self.codes.shape[2], f"{prefix}_steps": self.scale.shape[2],
            **strides(f"{prefix}_new", source, "bhs"),
        }  # fmt: skip

    def static(self, prefix: str) -> frozenset[str]:
        """Which of the arguments are multiples of 16 whatever the batch is."""
        return fixed(self.new.shape[3], *(f"{prefix}_new_{letter}" for letter in "bhs"))

    @property
    def window(self) -> int:
        """R, tokens that the residual has room for."""
        return self.residual.shape[2] - 1


@triton.jit
def span_rows(positions_ptr, out_ptr, length, positions_b, BLOCK: tl.constexpr):
    """Of one row: tokens before this call and after it, and the first column that is a token."""
    row = tl.program_id(0).to(tl.int64)
    newest = tl.full([BLOCK], -1, tl.int32)
    oldest = tl.full([BLOCK], NOWHERE, tl.int32)
    place = tl.full([BLOCK], NOWHERE, tl.int32)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = tl.load(positions_ptr + row * positions_b + column, mask=column < length, other=-1).to(tl.int32)
        newest = tl.maximum(newest, at)
        oldest = tl.minimum(oldest, tl.where(at >= 0, at, NOWHERE))
        place = tl.minimum(place, tl.where(at >= 0, column, NOWHERE))
    after = tl.max(newest, axis=0) + 1
    first = tl.min(place, axis=0)
    tl.store(out_ptr + row * 3, tl.minimum(tl.min(oldest, axis=0), after))
    tl.store(out_ptr + row * 3 + 1, after)
    tl.store(out_ptr + row * 3 + 2, tl.where(first == NOWHERE, 0, first))


@triton.jit
def rounded_until(tokens, WINDOW: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """How many of the first tokens lie in codes."""
    if PER_CHANNEL:
        until = tokens // WINDOW * WINDOW
    else:
        until = tl.maximum(tokens - WINDOW, 0)
    return until


@triton.jit
def load_tokens(
    codes_ptr, scale_ptr, zero_ptr, residual_ptr, new_ptr, new_s, slot, channel, inside, before, after, first,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Channels of tokens of one head in the dtype of the new ones, 0 where there is none.

    `slot` and `channel` are broadcast to the tile, either way round; pointers are those of the head.
    """
    width: tl.constexpr = HEAD_DIM * BITS // 8
    until = rounded_until(before, WINDOW, PER_CHANNEL)
    rounded = inside & (slot < until)
    # Every code of a byte is wanted; later loads find it in the first-level cache.
    byte = tl.load(codes_ptr + slot * width + channel % width, mask=rounded, other=0).to(tl.int32)
    level = ((byte >> (channel // width * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    if PER_CHANNEL:
        step_at = slot // GROUP * HEAD_DIM + channel
    else:
        step_at = slot * (HEAD_DIM // GROUP) + channel // GROUP
    step = tl.load(scale_ptr + step_at, mask=rounded, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + step_at, mask=rounded, other=0.0).to(tl.float32)
    recent = inside & (slot >= until) & (slot < before)
    held = tl.load(residual_ptr + slot % WINDOW * HEAD_DIM + channel, mask=recent, other=0.0)
    fresh = inside & (slot >= before) & (slot < after)
    new = tl.load(new_ptr + (first + slot - before) * new_s + channel, mask=fresh, other=0.0)
    dense = (level * step + zero).to(new.dtype)
    return tl.where(rounded, dense, tl.where(recent, held.to(new.dtype), new))


@triton.jit
def head_of(
    codes_ptr, scale_ptr, zero_ptr, residual_ptr, new_ptr, batch, head, heads, slots, steps, new_b, new_h,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The five pointers of a cache, moved to one head of one row."""
    place = batch * heads + head
    step_width: tl.constexpr = HEAD_DIM if PER_CHANNEL else HEAD_DIM // GROUP
    step_at = place * steps * step_width
    return (
        codes_ptr + place * slots * (HEAD_DIM * BITS // 8), scale_ptr + step_at, zero_ptr + step_at,
        residual_ptr + place * ((WINDOW + 1) * HEAD_DIM), new_ptr + batch * new_b + head * new_h,
    )  # fmt: skip


@triton.jit
def leaving(residual_ptr, new_ptr, new_s, place, channel, inside, before, first, WINDOW: tl.constexpr,
            HEAD_DIM: tl.constexpr):  # fmt: skip
    """Float32 numbers of tokens that are not rounded yet."""
    old = tl.load(residual_ptr + place % WINDOW * HEAD_DIM + channel, mask=inside & (place < before), other=0.0)
    new_at = new_ptr + (first + place - before) * new_s + channel
    new = tl.load(new_at, mask=inside & (place >= before), other=0.0)
    return tl.where(place < before, old.to(tl.float32), new.to(tl.float32))


@triton.jit
def grid_of(x, inside, axis: tl.constexpr, BITS: tl.constexpr):
    """Zero and step in float16 of groups whose members lie along `axis`."""
    low = tl.min(tl.where(inside, x, float("inf")), axis=axis)
    high = tl.max(tl.where(inside, x, float("-inf")), axis=axis)
    span = tl.math.div_rn(high - low, tl.zeros_like(low) + ((1 << BITS) - 1))
    return low.to(tl.float16), tl.maximum(span.to(tl.float16).to(tl.float32), SMALLEST_STEP).to(tl.float16)


@triton.jit
def levels_of(x, zero, step, BITS: tl.constexpr):
    """Codes in int32 of float32 `x` by zero and step of its shape."""
    level = round_half_even(tl.math.div_rn(x - zero, step))
    return tl.minimum(tl.maximum(level, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def round_channels(
    side_codes_ptr, side_scale_ptr, side_zero_ptr, side_residual_ptr, side_new_ptr, spans_ptr,
    heads, side_slots, side_steps, side_new_b, side_new_h, side_new_s,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One group of tokens of one head, each channel by its own scale."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    before, after = tl.load(spans_ptr + batch * 3), tl.load(spans_ptr + batch * 3 + 1)
    first = tl.load(spans_ptr + batch * 3 + 2)
    start = rounded_until(before, WINDOW, PER_CHANNEL) + tl.program_id(0) * GROUP
    # Windows are whole groups, so a group leaves as a whole or not at all.
    if start < rounded_until(after, WINDOW, PER_CHANNEL):
        codes, scale, zeros, residual, new = head_of(
            side_codes_ptr, side_scale_ptr, side_zero_ptr, side_residual_ptr, side_new_ptr, batch, head, heads,
            side_slots, side_steps, side_new_b, side_new_h, HEAD_DIM, BITS, GROUP, PER_CHANNEL, WINDOW,
        )  # fmt: skip
        width: tl.constexpr = HEAD_DIM * BITS // 8
        member, column = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_W)
        inside = (member < GROUP)[:, None] & (column < width)[None, :]
        place = (start + member)[:, None]
        byte = tl.zeros([BLOCK_GROUP, BLOCK_W], tl.int32)
        for part in tl.static_range(8 // BITS):
            channel = part * width + column
            x = leaving(
                residual, new, side_new_s, place, channel[None, :], inside, before, first, WINDOW, HEAD_DIM
            )  # fmt: skip
            zero, step = grid_of(x, inside, 0, BITS)
            step_at = start // GROUP * HEAD_DIM + channel
            tl.store(scale + step_at, step, mask=column < width)
            tl.store(zeros + step_at, zero, mask=column < width)
            own_zero = tl.broadcast_to(zero.to(tl.float32)[None, :], x.shape)
            own_step = tl.broadcast_to(step.to(tl.float32)[None, :], x.shape)
            byte |= levels_of(x, own_zero, own_step, BITS) << (part * BITS)
        tl.store(codes + place * width + column[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit
def round_tokens(
    side_codes_ptr, side_scale_ptr, side_zero_ptr, side_residual_ptr, side_new_ptr, spans_ptr,
    heads, side_slots, side_steps, side_new_b, side_new_h, side_new_s,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One token of one head, each group of channels by its own scale."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    before, after = tl.load(spans_ptr + batch * 3), tl.load(spans_ptr + batch * 3 + 1)
    first = tl.load(spans_ptr + batch * 3 + 2)
    place = rounded_until(before, WINDOW, PER_CHANNEL) + tl.program_id(0)
    if place < rounded_until(after, WINDOW, PER_CHANNEL):
        codes, scale, zeros, residual, new = head_of(
            side_codes_ptr, side_scale_ptr, side_zero_ptr, side_residual_ptr, side_new_ptr, batch, head, heads,
            side_slots, side_steps, side_new_b, side_new_h, HEAD_DIM, BITS, GROUP, PER_CHANNEL, WINDOW,
        )  # fmt: skip
        width: tl.constexpr = HEAD_DIM * BITS // 8
        groups: tl.constexpr = HEAD_DIM // GROUP
        group, member = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_GROUP)
        inside = (group < groups)[:, None] & (member < GROUP)[None, :]
        channel = group[:, None] * GROUP + member[None, :]
        x = leaving(residual, new, side_new_s, place, channel, inside, before, first, WINDOW, HEAD_DIM)
        zero, step = grid_of(x, inside, 1, BITS)
        tl.store(scale + place * groups + group, step, mask=group < groups)
        tl.store(zeros + place * groups + group, zero, mask=group < groups)
        column = tl.arange(0, BLOCK_W)
        byte = tl.zeros([BLOCK_W], tl.int32)
        for part in tl.static_range(8 // BITS):
            channel = part * width + column
            x = leaving(residual, new, side_new_s, place, channel, column < width, before, first, WINDOW, HEAD_DIM)
            # A sum of one number: which group a channel is in does not follow from its place in the byte.
            own = (channel // GROUP)[None, :] == group[:, None]
            own_zero = tl.sum(tl.where(own, zero.to(tl.float32)[:, None], 0.0), axis=0)
            own_step = tl.sum(tl.where(own, step.to(tl.float32)[:, None], 0.0), axis=0)
            # Channels beyond the last have no group.
            own_step = tl.where(own_step == 0.0, 1.0, own_step)
            byte |= levels_of(x, own_zero, own_step, BITS) << (part * BITS)
        tl.store(codes + place * width + column, byte.to(tl.uint8), mask=column < width)


@triton.jit
def keep_newest(
    new_ptr, positions_ptr, spans_ptr, residual_ptr, heads, length, positions_b, new_b, new_h, new_s,
    HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some new tokens of one head into the residual, if no later ones take their slots."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    after = tl.load(spans_ptr + batch * 3 + 1)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    at = tl.load(positions_ptr + batch * positions_b + token, mask=token < length, other=-1).to(tl.int32)
    kept = (at >= 0) & (at >= after - WINDOW)
    channel = tl.arange(0, BLOCK_D)
    mask = kept[:, None] & (channel < HEAD_DIM)[None, :]
    source = new_ptr + batch * new_b + head * new_h + token.to(tl.int64)[:, None] * new_s + channel[None, :]
    slot = tl.where(kept, at % WINDOW, 0)
    target = residual_ptr + (batch * heads + head) * ((WINDOW + 1) * HEAD_DIM) + slot[:, None] * HEAD_DIM
    tl.store(target + channel[None, :], tl.load(source, mask=mask).to(residual_ptr.dtype.element_ty), mask=mask)


@triton.jit
def read_rows(
    side_codes_ptr, side_scale_ptr, side_zero_ptr, side_residual_ptr, side_new_ptr, spans_ptr, out_ptr,
    heads, keys, side_slots, side_steps, side_new_b, side_new_h, side_new_s,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head in floating point."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    before, after = tl.load(spans_ptr + batch * 3), tl.load(spans_ptr + batch * 3 + 1)
    codes, scale, zeros, residual, new = head_of(
        side_codes_ptr, side_scale_ptr, side_zero_ptr, side_residual_ptr, side_new_ptr, batch, head, heads,
        side_slots, side_steps, side_new_b, side_new_h, HEAD_DIM, BITS, GROUP, PER_CHANNEL, WINDOW,
    )  # fmt: skip
    slot = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, BLOCK_D)
    inside = (slot < keys)[:, None] & (channel < HEAD_DIM)[None, :]
    x = load_tokens(
        codes, scale, zeros, residual, new, side_new_s, slot[:, None], channel[None, :], inside, before, after,
        tl.load(spans_ptr + batch * 3 + 2), HEAD_DIM, BITS, GROUP, PER_CHANNEL, WINDOW,
    )  # fmt: skip
    target = out_ptr + ((batch * heads + head) * keys + slot)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, x, mask=inside)


def token_spans(run: Runner, positions: Tensor) -> Tensor:
    """Int32 [B, 3] of positions int64 [B, S]: tokens before the call, tokens after it, and the first that is one."""
    at = positions.contiguous()
    batch, length = at.shape
    out = torch.empty(batch, 3, dtype=torch.int32, device=at.device)
    run(
        Launch(
            span_rows,
            {"positions_ptr": at, "out_ptr": out, "length": length, "positions_b": length},
            {"BLOCK": 256},
            (Config.of(4), Config.of(1)),
            lambda c: (batch,),
            lambda c: Work(4 * length, 8 * length),
        )
    )
    return out


def update(run: Runner, side: Side, positions: Tensor, spans: Tensor) -> None:
    """`graphwright.ops.kivi_update`; `spans` are those of `positions`. The scratch of a cache is not written at all.

    Two launches, because a token that leaves the residual does so before the one that takes its slot is written.

    Raises:
        BackendError: a layout without a kernel, or tensors on several devices.
    """
    side.check()
    batch, heads, length, dim = side.new.shape
    arguments = side.arguments("side")
    group, width = side.group_size, dim * side.bits // 8
    count = cdiv(length, group) + side.window // group if side.per_channel else length
    members = group if side.per_channel else 1
    run(
        Launch(
            round_channels if side.per_channel else round_tokens,
            {**arguments, "spans_ptr": spans, "heads": heads},
            {
                **_constants(side), "BLOCK_GROUP": next_power_of_2(group), "BLOCK_W": next_power_of_2(width),
                "BLOCK_GROUPS": 1 if side.per_channel else next_power_of_2(dim // group),
            },
            tuple(Config.of(warps) for warps in ((4, 8, 16) if members > 1 else (1, 4, 8))),
            lambda c: (count, batch * heads),
            lambda c: Work(40 * members * dim, members * dim * (side.new.element_size() + side.bits / 8)),
            static=side.static("side"),
        )
    )  # fmt: skip
    block = next_power_of_2(dim)
    run(
        Launch(
            keep_newest,
            {
                "new_ptr": arguments["side_new_ptr"], "positions_ptr": positions.contiguous(), "spans_ptr": spans,
                "residual_ptr": side.residual, "heads": heads, "length": length, "positions_b": length,
                **strides("new", arguments["side_new_ptr"], "bhs"),
            },
            {"HEAD_DIM": dim, "WINDOW": side.window},
            tuple(Config.of(4, BLOCK_TOKENS=tokens, BLOCK_D=block) for tokens in (4, 1, 16)),
            lambda c: (cdiv(length, c["BLOCK_TOKENS"]), batch * heads),
            lambda c: Work(c["BLOCK_TOKENS"] * dim, 2 * c["BLOCK_TOKENS"] * dim * side.new.element_size()),
            static=fixed(dim, "new_b", "new_h", "new_s"),
        )
    )  # fmt: skip


def read(run: Runner, side: Side, spans: Tensor, keys: int) -> Tensor:
    """`graphwright.ops.kivi_read`, [B, Hkv, keys, D] in the dtype of `side.new`; zeros where no token lies.

    Raises:
        BackendError: a layout without a kernel, or tensors on several devices.
    """
    side.check()
    batch, heads, _, dim = side.new.shape
    out = torch.empty(batch, heads, keys, dim, dtype=side.new.dtype, device=side.new.device)
    block = next_power_of_2(dim)
    run(
        Launch(
            read_rows,
            {**side.arguments("side"), "spans_ptr": spans, "out_ptr": out, "heads": heads, "keys": keys},
            _constants(side),
            tuple(Config.of(4, BLOCK_TOKENS=tokens, BLOCK_D=block) for tokens in (16, 4, 32)),
            lambda c: (cdiv(keys, c["BLOCK_TOKENS"]), batch * heads),
            lambda c: Work(6 * c["BLOCK_TOKENS"] * dim, c["BLOCK_TOKENS"] * dim * (out.element_size() + 1)),
            static=side.static("side"),
        )
    )
    return out


def _constants(side: Side) -> dict[str, Any]:
    return {
        "HEAD_DIM": side.new.shape[3], "BITS": side.bits, "GROUP": side.group_size,
        "PER_CHANNEL": side.per_channel, "WINDOW": side.window,
    }  # fmt: skip


def shaped(dtype: torch.dtype, bits: int, per_channel: bool, new: int = 1, slots: int = 4097) -> Side:
    """A cache of 8 heads of 128 without storage, to ask for launches with."""
    steps = meta(torch.float16, 4, 8, *((slots // 32, 128) if per_channel else (slots, 4)))
    codes, residual = meta(torch.uint8, 4, 8, slots, 16 * bits), meta(dtype, 4, 8, 129, 128)
    return Side(codes, steps, steps, residual, meta(dtype, 4, 8, new, 128), bits, 32, per_channel)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "spans": lambda run, dtype: token_spans(run, meta(torch.int64, 4, 512)),
    "2-bit keys": lambda run, dtype: update(
        run, shaped(dtype, 2, True, 512), meta(torch.int64, 4, 512), meta(torch.int32, 4, 3)
    ),
    "4-bit values": lambda run, dtype: update(
        run, shaped(dtype, 4, False), meta(torch.int64, 4, 1), meta(torch.int32, 4, 3)
    ),
    "read 2-bit keys": lambda run, dtype: read(run, shaped(dtype, 2, True, 512), meta(torch.int32, 4, 3), 4096),
    "read 2-bit values": lambda run, dtype: read(run, shaped(dtype, 2, False), meta(torch.int32, 4, 3), 4096),
}
