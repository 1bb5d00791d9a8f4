"""Attention of few queries over a KIVI cache, read where it lies: codes, residual and new tokens in one pass.

Liu et al. 2024, KIVI, arXiv:2402.02750; the keys are split among blocks as in `decode_attention` (Flash-Decoding, Dao
et al. 2023), and the parts joined by its kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.decode_attention import MOST_ROWS, join_parts, split
from graphwright.kernels.triton.flash_attention import check_heads, contiguous, empty_result, row_stride
from graphwright.kernels.triton.kivi import Side, head_of, load_tokens, shaped
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    check_device,
    dense,
    fixed,
    meta,
    next_power_of_2,
    strides,
)
from graphwright.kernels.triton.scores import accumulate, in_powers_of_two, join_sink, visible


@triton.jit
def attend_split(
    query_ptr, key_codes_ptr, key_scale_ptr, key_zero_ptr, key_residual_ptr, key_new_ptr,
    value_codes_ptr, value_scale_ptr, value_zero_ptr, value_residual_ptr, value_new_ptr, spans_ptr,
    out_ptr, largest_ptr, total_ptr, query_positions_ptr, key_positions_ptr, bias_ptr, slopes_ptr, sinks_ptr,
    kv_heads, length, keys, span, q_b, q_h, q_s, key_slots, key_steps, value_slots, value_steps,
    key_new_b, key_new_h, key_new_s, value_new_b, value_new_h, value_new_s,
    bias_b, bias_h, bias_s, bias_t, query_positions_b, key_positions_b, scale, softcap, window, chunk, prefix,
    ANCHORS: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr,
    PREFIXED: tl.constexpr, CAPPED: tl.constexpr, KEY_BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_GROUP: tl.constexpr, RESIDUAL: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All queries of one key-value head over one span of keys; row r is query r % length of head r // length."""
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    before, after = tl.load(spans_ptr + batch * 3), tl.load(spans_ptr + batch * 3 + 1)
    column = tl.load(spans_ptr + batch * 3 + 2)
    row = tl.arange(0, BLOCK_M)
    present = row < GROUPS * length
    token, head = row % length, kv_head * GROUPS + row // length
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    source = query_ptr + batch * q_b + (head * q_h + token * q_s)[:, None] + channel[None, :]
    query = tl.load(source, mask=present[:, None] & (channel[None, :] < HEAD_DIM), other=0.0)
    query_at = tl.where(present, token, -1)
    if query_positions_ptr is not None:
        at = query_positions_ptr + batch * query_positions_b + token
        query_at = tl.load(at, mask=present, other=-1).to(tl.int32)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=present, other=0.0).to(tl.float32)
    key_codes, key_scale, key_zero, key_residual, key_new = head_of(
        key_codes_ptr, key_scale_ptr, key_zero_ptr, key_residual_ptr, key_new_ptr, batch, kv_head, kv_heads,
        key_slots, key_steps, key_new_b, key_new_h, HEAD_DIM, KEY_BITS, KEY_GROUP, True, RESIDUAL,
    )  # fmt: skip
    value_codes, value_scale, value_zero, value_residual, value_new = head_of(
        value_codes_ptr, value_scale_ptr, value_zero_ptr, value_residual_ptr, value_new_ptr, batch, kv_head, kv_heads,
        value_slots, value_steps, value_new_b, value_new_h, VALUE_DIM, VALUE_BITS, VALUE_GROUP, False, RESIDUAL,
    )  # fmt: skip
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    start = split * span
    end = tl.minimum(start + span, tl.minimum(keys, after))
    for first in range(start, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        inside = slot < end
        key = load_tokens(
            key_codes, key_scale, key_zero, key_residual, key_new, key_new_s, slot[None, :], channel[:, None],
            inside[None, :] & (channel[:, None] < HEAD_DIM), before, after, column,
            HEAD_DIM, KEY_BITS, KEY_GROUP, True, RESIDUAL,
        )  # fmt: skip
        scores = tl.dot(query, key, input_precision="ieee")
        key_at = tl.where(inside, slot, -1)
        if key_positions_ptr is not None:
            position_at = key_positions_ptr + batch * key_positions_b + slot
            key_at = tl.load(position_at, mask=inside, other=-1).to(tl.int32)
        bias = None
        if bias_ptr is not None:
            bias_at = bias_ptr + batch * bias_b + (head * bias_h + token * bias_s)[:, None] + slot[None, :] * bias_t
            bias = tl.load(bias_at, mask=present[:, None] & inside[None, :], other=0.0)
        scores = in_powers_of_two(scores, scale, softcap, bias, slope, query_at, key_at, CAPPED)
        seen = visible(
            query_at, key_at, window, chunk, prefix, CAUSAL, WINDOWED, CHUNKED, PREFIXED, ANCHORS, WINDOW_BLOCK
        )
        scores = tl.where(seen, scores, float("-inf"))
        value = load_tokens(
            value_codes, value_scale, value_zero, value_residual, value_new, value_new_s,
            slot[:, None], value_channel[None, :], inside[:, None] & (value_channel[None, :] < VALUE_DIM),
            before, after, column, VALUE_DIM, VALUE_BITS, VALUE_GROUP, False, RESIDUAL,
        )  # fmt: skip
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


def attention(
    run: Runner,
    query: Tensor,
    key: Side,
    value: Side,
    spans: Tensor,
    keys: int,
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
) -> Tensor:
    """`graphwright.ops.attention` for few queries over what `kivi.read` gives of `key` and `value`.

    `query` [B, H, S, D] has at most `decode_attention.MOST_ROWS` rows for a key-value head, `key` is rounded per
    channel and `value` per token, `spans` is what `kivi.token_spans` gives, and `keys` the number of slots that may be
    in use. The result [B, H, S, Dv] lies in memory as `flash_attention.empty_result` says.

    Raises:
        BackendError: too many queries, or a layout that no kernel reads.
    """
    for side in (key, value):
        side.check()
    check_heads(query, key.new, value.new)
    check_device(query=query, key=key.codes, query_positions=query_positions, sinks=sinks, spans=spans)
    batch, heads, length, dim = query.shape
    kv_heads, value_dim = key.new.shape[1], value.new.shape[3]
    rows = heads // kv_heads * length
    if rows > MOST_ROWS or key.window != value.window or not key.per_channel or value.per_channel:
        raise BackendError(
            f"No kernel attends {rows} queries per key-value head to this KIVI cache",
            fix=f"It takes up to {MOST_ROWS}, keys per channel, values per token and one residual for both",
        )
    splits, span = split(batch * kv_heads, keys, run.device)
    out, finish = empty_result(query, value_dim), splits == 1
    shape = (splits, batch * heads * length)
    parts = out if finish else torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device)
    largest, total = (
        None if finish else torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    q = dense(query)
    spread = None if bias is None else bias.expand(batch, heads, length, keys)
    bias_strides = (0, 0, 0, 0) if spread is None else spread.stride()
    moved = span * (dim * key.bits + value_dim * value.bits) / 8 + span * (4 * dim / key.group_size + 16)
    run(
        Launch(
            attend_split,
            {
                "query_ptr": q, **key.arguments("key"), **value.arguments("value"), "spans_ptr": spans,
                "out_ptr": parts, "largest_ptr": largest, "total_ptr": total,
                "query_positions_ptr": contiguous(query_positions), "key_positions_ptr": contiguous(key_positions),
                "bias_ptr": spread, "slopes_ptr": alibi_slopes, "sinks_ptr": sinks if finish else None,
                "kv_heads": kv_heads, "length": length, "keys": keys, "span": span, **strides("q", q, "bhs"),
                **{f"bias_{letter}": stride for letter, stride in zip("bhst", bias_strides, strict=True)},
                "query_positions_b": row_stride(query_positions), "key_positions_b": row_stride(key_positions),
                "scale": float(scale), "softcap": float(softcap), "window": window, "chunk": chunk, "prefix": prefix,
            },
            {
                "HEAD_DIM": dim, "VALUE_DIM": value_dim, "GROUPS": heads // kv_heads,
                "BLOCK_D": max(16, next_power_of_2(dim)), "BLOCK_V": max(16, next_power_of_2(value_dim)),
                "CAUSAL": causal, "WINDOWED": window > 0, "CHUNKED": chunk > 0, "PREFIXED": prefix > 0,
                "CAPPED": softcap > 0, "ANCHORS": anchors, "WINDOW_BLOCK": block,
                "KEY_BITS": key.bits, "KEY_GROUP": key.group_size, "VALUE_BITS": value.bits,
                "VALUE_GROUP": value.group_size, "RESIDUAL": key.window, "FINISH": finish,
            },
            _configs(rows, query.dtype),
            lambda c: (batch * kv_heads, splits),
            lambda c: Work(
                2 * c["BLOCK_M"] * span * (dim + value_dim), moved, str(query.dtype).removeprefix("torch."),
                moved / span * c["BLOCK_N"],
            ),
            matrix=query.dtype != torch.float32,
            static=fixed(dim, "q_b", "q_h", "q_s") | key.static("key") | value.static("value"),
        )
    )  # fmt: skip
    if not finish:
        join_parts(run, parts, largest, total, sinks, out, splits)
    return out


def _configs(rows: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Tiles of keys, without a pipeline: it would hold all three places of every token in shared memory."""
    pairs = ((32, 4), (16, 4)) if dtype == torch.float32 else ((64, 4), (64, 8), (32, 4), (32, 8), (16, 4), (16, 8))
    tile = 16 if rows <= 16 else next_power_of_2(rows)
    return tuple(Config.of(warps, 1, BLOCK_M=tile, BLOCK_N=keys) for keys, warps in pairs)


def _shape(run: Runner, dtype: torch.dtype, bits: int, slots: int) -> Tensor:
    key, value = (shaped(dtype, bits, per_channel, slots=slots) for per_channel in (True, False))
    query, at = meta(dtype, 4, 32, 1, 128), meta(torch.int64, 4, 1)
    spans, keys = meta(torch.int32, 4, 3), slots - 1
    options = (meta(torch.int64, 1, keys), None, None, None, 0.1, True)
    return attention(run, query, key, value, spans, keys, at, *options)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "2 bits, 4096 keys": lambda run, dtype: _shape(run, dtype, 2, 4097),
    "4 bits, 200 keys": lambda run, dtype: _shape(run, dtype, 4, 225),
}
