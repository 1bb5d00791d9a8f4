"""Attention of few queries over a long cache: the keys are split among blocks, and their results joined.

Flash-Decoding: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; paged caches: Kwon et al.
2023, arXiv:2309.06180. The heads that share keys form the rows of one matrix product, so every key and value is read
once. Caches of keys per channel, behind a window in floating point, have a kernel of their own (`kivi_attention`).

Caches may hold, in place of floating point, symmetric int8 or fp8 codes with a scale per token, or 4-bit codes with
scale and zero point per token. 4-bit codes lie two to a byte: the first half of the channels in the low nibbles. All of
them may lie in blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.cache_codes import load_codes
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.flash_attention import check_heads, contiguous, empty_result, row_stride
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
from graphwright.kernels.triton.scores import accumulate, in_powers_of_two, join_sink, visible

MOST_ROWS = 64
"""Queries times heads per key-value head above which `flash_attention` is the better kernel."""

MOST_SPLITS = 64
SPLIT_AT_LEAST = 256
"""Keys that a block takes at least, or joining the parts would cost more than it saves."""


@triton.jit
def split_attention(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, key_zero_ptr, value_scale_ptr, value_zero_ptr,
    out_ptr, largest_ptr, total_ptr,
    query_positions_ptr, key_positions_ptr, table_ptr, lengths_ptr, bias_ptr, slopes_ptr, sinks_ptr,
    kv_heads, length, keys, span, q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t,
    scale_b, scale_h, scale_t, value_scale_b, value_scale_h, value_scale_t,
    bias_b, bias_h, bias_s, bias_t, query_positions_b, key_positions_b, pages,
    scale, softcap, window, chunk, prefix,
    ANCHORS: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr,
    PREFIXED: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All queries of one key-value head over one span of keys; row r is query r % length of head r // length."""
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    present = row < GROUPS * length
    token, head = row % length, kv_head * GROUPS + row // length
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    source = query_ptr + batch * q_b + (head * q_h + token * q_s)[:, None] + channel[None, :]
    query = tl.load(source, mask=present[:, None] & (channel[None, :] < HEAD_DIM), other=0.0)
    known = keys
    if lengths_ptr is not None:
        known = tl.load(lengths_ptr + batch).to(tl.int32)
    if query_positions_ptr is not None:
        at = query_positions_ptr + batch * query_positions_b + token
        query_at = tl.load(at, mask=present, other=-1).to(tl.int32)
    elif lengths_ptr is not None:
        query_at = tl.where(present, known - length + token, -1)
    else:
        query_at = tl.where(present, token, -1)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=present, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    start = split * span
    end = tl.minimum(start + span, known)
    for first in range(start, end, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        inside = item < end
        if PAGE > 0:
            page = tl.load(table_ptr + batch * pages + item // PAGE, mask=inside, other=0).to(tl.int64)
            # A row that is shorter than others has no block here, and sees nothing of what is read instead.
            owner, within = tl.maximum(page, 0), item % PAGE
        else:
            owner, within = batch, item.to(tl.int64)
        key_base = owner * k_b + kv_head * k_h + within * k_t
        value_base = owner * v_b + kv_head * v_h + within * v_t
        key_mask = inside[None, :] & (channel[:, None] < HEAD_DIM)
        value_mask = inside[:, None] & (value_channel[None, :] < VALUE_DIM)
        if key_scale_ptr is None:
            key = tl.load(key_ptr + key_base[None, :] + channel[:, None], mask=key_mask, other=0.0)
        else:
            key = load_codes(key_ptr, key_base[None, :], channel[:, None], key_mask, KEY_BITS, HEAD_DIM)
            if key_zero_ptr is not None:
                zero_at = key_zero_ptr + owner * scale_b + kv_head * scale_h + within * scale_t
                key -= tl.load(zero_at, mask=inside, other=0.0).to(tl.float32)[None, :]
            elif KEY_BITS == 4:
                key -= 8.0
            key = key.to(query.dtype)
        scores = tl.dot(query, key, input_precision="ieee")
        if key_scale_ptr is not None:
            scale_at = key_scale_ptr + owner * scale_b + kv_head * scale_h + within * scale_t
            scores *= tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if key_positions_ptr is not None:
            position_at = key_positions_ptr + batch * key_positions_b + item
            key_at = tl.load(position_at, mask=inside, other=-1).to(tl.int32)
        else:
            key_at = tl.where(inside, item, -1)
        bias = None
        if bias_ptr is not None:
            bias_at = bias_ptr + batch * bias_b + (head * bias_h + token * bias_s)[:, None] + item[None, :] * bias_t
            bias = tl.load(bias_at, mask=present[:, None] & inside[None, :], other=0.0)
        scores = in_powers_of_two(scores, scale, softcap, bias, slope, query_at, key_at, CAPPED)
        seen = visible(
            query_at, key_at, window, chunk, prefix, CAUSAL, WINDOWED, CHUNKED, PREFIXED, ANCHORS, WINDOW_BLOCK
        )
        scores = tl.where(seen, scores, float("-inf"))
        if value_scale_ptr is None:
            value = tl.load(value_ptr + value_base[:, None] + value_channel[None, :], mask=value_mask, other=0.0)
        else:
            value = load_codes(
                value_ptr, value_base[:, None], value_channel[None, :], value_mask, VALUE_BITS, VALUE_DIM
            )
            step_of = owner * value_scale_b + kv_head * value_scale_h + within * value_scale_t
            if value_zero_ptr is not None:
                value -= tl.load(value_zero_ptr + step_of, mask=inside, other=0.0).to(tl.float32)[:, None]
            elif VALUE_BITS == 4:
                value -= 8.0
            value *= tl.load(value_scale_ptr + step_of, mask=inside, other=0.0).to(tl.float32)[:, None]
            value = value.to(query.dtype)
        total, largest, mixed = accumulate(scores, value, total, largest, mixed)
    if FINISH:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=present, other=0.0)
            total, largest, mixed = join_sink(sink, total, largest, mixed)
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        rows = (batch * length + token) * kv_heads * GROUPS + head
    else:
        rows = (batch * kv_heads * GROUPS + head) * length + token
        rows += split.to(tl.int64) * tl.num_programs(0) * GROUPS * length
        tl.store(largest_ptr + rows, largest, mask=present)
        tl.store(total_ptr + rows, total, mask=present)
    target = out_ptr + rows[:, None] * VALUE_DIM + value_channel[None, :]
    stored = present[:, None] & (value_channel[None, :] < VALUE_DIM)
    tl.store(target, mixed.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def join_splits(
    parts_ptr, largest_ptr, total_ptr, sinks_ptr, out_ptr, rows, heads, length, splits,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of the result from its parts: their weights follow from the largest score each has seen."""
    row = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_V)
    at = split.to(tl.int64) * rows + row
    largest = tl.load(largest_ptr + at, mask=split < splits, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=split < splits, other=0.0)
    peak = tl.max(largest, axis=0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row // length % heads).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(largest - peak)
    everything = tl.sum(total * weight, axis=0)
    if sinks_ptr is not None:
        everything += tl.exp2(sink - peak)
    inside = (split[:, None] < splits) & (channel[None, :] < VALUE_DIM)
    parts = tl.load(parts_ptr + at[:, None] * VALUE_DIM + channel[None, :], mask=inside, other=0.0)
    mixed = tl.sum(parts * weight[:, None], axis=0) / tl.where(everything == 0.0, 1.0, everything)
    place = (row // (heads * length) * length + row % length) * heads + row // length % heads
    tl.store(out_ptr + place * VALUE_DIM + channel, mixed.to(out_ptr.dtype.element_ty), mask=channel < VALUE_DIM)


@dataclass(frozen=True)
class Codes:
    """A key or value cache of low-bit codes.

    Attributes:
        codes: int8 or fp8 [B, Hkv, T, D], bits of e4m3 as uint8 [B, Hkv, T, D], or uint8 [B, Hkv, T, D / 2] for 4 bits.
        scale: float [B, Hkv, T].
        zero_point: like `scale`, or None for symmetric codes; of 4 bits, 8 is zero then.
        bits: 8 or 4.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    bits: int = 8

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.codes.shape[-1] * 8 // self.bits

    def dequantize(self) -> Tensor:
        """Float32 [B, Hkv, T, D]: the definition of the layout."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        elif codes.dtype == torch.uint8:
            codes = codes.view(torch.float8_e4m3fn)
        wide = codes.float()
        scale, zero = (None if x is None else x.float()[..., None] for x in (self.scale, self.zero_point))
        symmetric = 8.0 if self.bits == 4 else 0.0
        return (wide - (symmetric if zero is None else zero)) * scale


@dataclass(frozen=True)
class Pages:
    """Where the tokens of a paged cache lie; keys and values are then [pages, Hkv, page size, D].

    Attributes:
        table: int32 or int64 [B, most pages of a sequence], the page of each run of tokens; negative for none.
        lengths: int32 [B], tokens of each sequence, the queries included; the queries are the last ones. None where
            positions tell who sees what.
        keys: slots of a sequence that may be in use; 0 for all in the table.
    """

    table: Tensor
    lengths: Tensor | None = None
    keys: int = 0


def attention(
    run: Runner,
    query: Tensor,
    key: Tensor | Codes,
    value: Tensor | Codes,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    softcap: float = 0.0,
    anchors: int = 0,
    block: int = 0,
    *,
    pages: Pages | None = None,
) -> Tensor:
    """`graphwright.ops.attention` for few queries, over plain, quantized or paged caches.

    The result lies in memory as `flash_attention.empty_result` says.

    Raises:
        BackendError: too many queries, a head that is too wide, or a layout that no kernel reads.
    """
    keys_held, values_held = (x.codes if isinstance(x, Codes) else x for x in (key, value))
    dim = key.dim if isinstance(key, Codes) else key.shape[3]
    value_dim = value.dim if isinstance(value, Codes) else value.shape[3]
    check_device(query=query, key=keys_held, value=values_held, query_positions=query_positions, sinks=sinks)
    if not isinstance(key, Codes) and not isinstance(value, Codes):
        check_heads(query, key, value)
    if keys_held.dtype == torch.float8_e4m3fn and not run.device.fp8:
        raise BackendError(f"{run.device.name} does not convert e4m3", fix="Store the cache as int8 or e5m2")
    batch, heads, length, _ = query.shape
    kv_heads = keys_held.shape[1]
    rows = heads // kv_heads * length
    if rows > MOST_ROWS:
        raise BackendError(
            f"{rows} queries per key-value head are too many for split attention",
            fix=f"It takes up to {MOST_ROWS}; use flash_attention",
        )
    page = 0 if pages is None else keys_held.shape[2]
    keys = keys_held.shape[2] if pages is None else pages.keys or pages.table.shape[1] * page
    splits, span = split(batch * kv_heads, keys, run.device)
    out = empty_result(query, value_dim)
    finish = splits == 1
    shape = (splits, batch * heads * length)
    parts = out if finish else torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device)
    largest, total = (
        None if finish else torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    q, k, v = dense(query), dense(keys_held), dense(values_held)
    spread = None if bias is None else bias.expand(batch, heads, length, keys)
    bias_strides = (0, 0, 0, 0) if spread is None else spread.stride()
    quantized = {**_codes("key", key), **_codes("value", value)}
    tile = 16 if rows <= 16 else next_power_of_2(rows)
    run(
        Launch(
            split_attention,
            {
                "query_ptr": q, "key_ptr": k, "value_ptr": v, **quantized,
                "out_ptr": parts, "largest_ptr": largest, "total_ptr": total,
                "query_positions_ptr": contiguous(query_positions), "key_positions_ptr": contiguous(key_positions),
                "table_ptr": None if pages is None else pages.table.contiguous(),
                "lengths_ptr": None if pages is None else pages.lengths, "bias_ptr": spread,
                "slopes_ptr": alibi_slopes, "sinks_ptr": sinks if finish else None,
                "kv_heads": kv_heads, "length": length, "keys": keys, "span": span,
                **strides("q", q, "bhs"), **strides("k", k, "bht"), **strides("v", v, "bht"),
                **{f"bias_{letter}": stride for letter, stride in zip("bhst", bias_strides, strict=True)},
                "query_positions_b": row_stride(query_positions), "key_positions_b": row_stride(key_positions),
                "pages": 0 if pages is None else pages.table.shape[1],
                "scale": float(scale), "softcap": float(softcap), "window": window, "chunk": chunk, "prefix": prefix,
            },
            {
                "HEAD_DIM": dim, "VALUE_DIM": value_dim, "GROUPS": heads // kv_heads,
                "BLOCK_D": max(16, next_power_of_2(dim)), "BLOCK_V": max(16, next_power_of_2(value_dim)),
                "CAUSAL": causal, "WINDOWED": window > 0, "CHUNKED": chunk > 0, "PREFIXED": prefix > 0,
                "CAPPED": softcap > 0, "PAGE": page, "ANCHORS": anchors, "WINDOW_BLOCK": block,
                "KEY_BITS": key.bits if isinstance(key, Codes) else 0,
                "VALUE_BITS": value.bits if isinstance(value, Codes) else 0,
                "FINISH": finish,
            },
            configs(run.device, tile, max(dim, value_dim), query.dtype),
            lambda c: (batch * kv_heads, splits),
            lambda c: _work(query, span, dim + value_dim, k, v, c),
            matrix=query.dtype != torch.float32,
            static=fixed(dim, "q_b", "q_h", "q_s") | fixed(k.shape[-1], "k_b", "k_h", "k_t")
            | fixed(v.shape[-1], "v_b", "v_h", "v_t"),
        )
    )  # fmt: skip
    if not finish:
        join_parts(run, parts, largest, total, sinks, out, splits)
    return out


def join_parts(
    run: Runner,
    parts: Tensor,
    largest: Tensor | None,
    total: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    splits: int,
) -> None:
    """Joins float32 parts [splits, B * H * S, Dv] by the largest score and the total that each has, into `out`."""
    batch, heads, length, value_dim = out.shape
    rows = batch * heads * length
    run(
        Launch(
            join_splits,
            {
                "parts_ptr": parts, "largest_ptr": largest, "total_ptr": total, "sinks_ptr": sinks, "out_ptr": out,
                "rows": rows, "heads": heads, "length": length, "splits": splits,
            },
            {
                "VALUE_DIM": value_dim, "BLOCK_V": max(16, next_power_of_2(value_dim)),
                "BLOCK_SPLITS": 16 if splits <= 16 else MOST_SPLITS,
            },
            (Config.of(4), Config.of(8)),
            lambda c: (rows,),
            lambda c: Work(2 * splits * value_dim, 4 * splits * (value_dim + 2)),
        )
    )  # fmt: skip


def split(blocks: int, keys: int, device: Device) -> tuple[int, int]:
    """How many parts the keys are cut into, and the keys of each: enough blocks to load from every unit."""
    wanted = cdiv(2 * device.units, blocks)
    splits = max(1, min(wanted, keys // SPLIT_AT_LEAST, MOST_SPLITS))
    span = cdiv(cdiv(keys, splits), 128) * 128
    return max(1, cdiv(keys, span)), span


def configs(device: Device, rows: int, head_dim: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Tiles of keys; memory is the limit, so what matters is how much is in flight."""
    if dtype == torch.float32:
        return tuple(Config.of(4, 2, BLOCK_M=rows, BLOCK_N=keys) for keys in (32, 16))
    if device.matrix_unit == "wmma":
        # 256 registers a thread, and every operand of a wmma instruction lies twice in them.
        pairs = ((64, 8), (32, 8), (16, 8), (32, 4), (16, 4))
        return tuple(Config.of(warps, 1, BLOCK_M=rows, BLOCK_N=keys) for keys, warps in pairs)
    stages = 1 if device.target.kind == "rocm" else 3
    tiles = [(128, 4, stages), (64, 4, stages), (64, 4, 2), (32, 4, 2), (64, 8, 2), (32, 8, 2), (32, 4, 1), (16, 4, 1)]
    kept = [tile for tile in tiles if head_dim <= 128 or tile[0] <= 64]
    return tuple(Config.of(warps, depth, BLOCK_M=rows, BLOCK_N=keys) for keys, warps, depth in dict.fromkeys(kept))


def _work(query: Tensor, span: int, dims: int, key: Tensor, value: Tensor, config: Config) -> Work:
    moved = span * (key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size())
    flight = moved / span * config["BLOCK_N"] * max(1, config.num_stages - 1)
    return Work(2 * config["BLOCK_M"] * span * dims, moved, str(query.dtype).removeprefix("torch."), flight)


def _codes(name: str, cache: Tensor | Codes) -> dict[str, Any]:
    scale = cache.scale if isinstance(cache, Codes) else None
    zero = cache.zero_point if isinstance(cache, Codes) else None
    # The kernel walks both by one set of strides.
    walked = scale is None or zero is None or zero.stride() == scale.stride()
    if scale is not None and not walked:
        scale, zero = scale.contiguous(), contiguous(zero)
    steps = (0, 0, 0) if scale is None else scale.stride()
    if name == "value":
        return {
            "value_scale_ptr": scale, "value_zero_ptr": zero, "value_scale_b": steps[0], "value_scale_h": steps[1],
            "value_scale_t": steps[2],
        }  # fmt: skip
    return {
        "key_scale_ptr": scale, "key_zero_ptr": zero, "scale_b": steps[0], "scale_h": steps[1], "scale_t": steps[2],
    }  # fmt: skip


def _shape(
    run: Runner,
    dtype: torch.dtype,
    keys: int,
    cache: tuple[Codes, Codes] | None = None,
    pages: Pages | None = None,
) -> Tensor:
    query = meta(dtype, 1, 32, 1, 128)
    plain = meta(dtype, 1, 8, keys, 128) if pages is None else meta(dtype, 512, 8, keys, 128)
    key, value = cache or (plain, plain)
    query_at = meta(torch.int64, 1, 1) if pages is None else None
    key_at = meta(torch.int64, 1, keys) if pages is None else None
    return attention(run, query, key, value, query_at, key_at, None, None, None, 0.1, True, pages=pages)


def _coded(keys: int, bits: int, zero: bool = False, storage: torch.dtype | None = None) -> Codes:
    codes = meta(storage or (torch.int8 if bits == 8 else torch.uint8), 1, 8, keys, 128 * bits // 8)
    scale = meta(torch.float16, 1, 8, keys)
    return Codes(codes, scale, scale if zero else None, bits)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "one span": lambda run, dtype: _shape(run, dtype, 200),
    "few splits": lambda run, dtype: _shape(run, dtype, 4096),
    "many splits": lambda run, dtype: _shape(run, dtype, 32768),
    "paged": lambda run, dtype: _shape(
        run, dtype, 16,
        pages=Pages(meta(torch.int32, 1, 256), meta(torch.int32, 1)),
    ),
    "int8 cache": lambda run, dtype: _shape(run, dtype, 4096, cache=(_coded(4096, 8), _coded(4096, 8))),
    "fp8 cache": lambda run, dtype: (
        _shape(run, dtype, 4096, cache=(_coded(4096, 8, storage=torch.float8_e4m3fn),) * 2) if run.device.fp8 else None
    ),
    "bits of fp8": lambda run, dtype: _shape(run, dtype, 4096, cache=(_coded(4096, 8, storage=torch.uint8),) * 2),
    "int4 cache": lambda run, dtype: _shape(
        run, dtype, 4096, cache=(_coded(4096, 4, zero=True), _coded(4096, 4, zero=True))
    ),
}  # fmt: skip
