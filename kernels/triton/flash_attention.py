"""Attention of many queries without storing the scores: one block of queries against blocks of keys.

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691. Serves every mask of `graphwright.ops.attention`:
causal, sliding window, chunks, prefix, padding and ragged batches by positions, soft cap, bias, alibi, sinks, grouped
heads. Where positions are given, a block first looks for the range of keys that its queries can reach at all, so
padding, unused cache slots and keys outside a window cost nothing but reading their positions.

Sequences of different lengths can also lie one after the other, without padding, with offsets that say where each
begins (Dao 2023): `packed_attention`, the same kernel, whose blocks find their sequence by counting.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.device import Device
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
from graphwright.kernels.triton.scores import accumulate, in_powers_of_two, join_sink, reachable, visible
from graphwright.ops import attention as semantic

LARGEST_HEAD = 256
"""Channels of a head whose tiles fit the shared memory of every target."""

CACHED = 0.25
"""Share of the repeated reads of keys and values that miss the L2 cache, for the time model."""


@triton.jit
def attend(
    start, end, query, query_at, slope, total, largest, mixed,
    key_ptr, value_ptr, key_positions_ptr, bias_ptr,
    keys, k_t, v_t, bias_s, bias_t, row, length, scale, softcap, window, chunk, prefix,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, PREFIXED: tl.constexpr,
    CAPPED: tl.constexpr, ANCHORS: tl.constexpr, WINDOW_BLOCK: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys `start` … `end`; MASKED False asserts that every key of them is seen."""
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for first in range(start, end, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        here = item.to(tl.int64)
        key_mask = channel[:, None] < HEAD_DIM
        value_mask = value_channel[None, :] < VALUE_DIM
        if MASKED:
            key_mask = key_mask & (item[None, :] < keys)
            value_mask = value_mask & (item[:, None] < keys)
        key = tl.load(key_ptr + here[None, :] * k_t + channel[:, None], mask=key_mask, other=0.0)
        scores = tl.dot(query, key, input_precision="ieee")
        if key_positions_ptr is not None:
            key_at = tl.load(key_positions_ptr + item, mask=item < keys, other=-1).to(tl.int32)
        else:
            key_at = tl.where(item < keys, item, -1)
        bias = None
        if bias_ptr is not None:
            inside = (row[:, None] < length) & (item[None, :] < keys)
            bias = tl.load(bias_ptr + row[:, None] * bias_s + item[None, :] * bias_t, mask=inside, other=0.0)
        scores = in_powers_of_two(scores, scale, softcap, bias, slope, query_at, key_at, CAPPED)
        if MASKED:
            seen = visible(
                query_at, key_at, window, chunk, prefix, CAUSAL, WINDOWED, CHUNKED, PREFIXED, ANCHORS, WINDOW_BLOCK
            )
            scores = tl.where(seen, scores, float("-inf"))
        value = tl.load(value_ptr + here[:, None] * v_t + value_channel[None, :], mask=value_mask, other=0.0)
        total, largest, mixed = accumulate(scores, value, total, largest, mixed)
    return total, largest, mixed


@triton.jit
def find_sequence(offsets_ptr, sequences, block, BLOCK_M: tl.constexpr, SCAN: tl.constexpr):
    """The sequence that block `block` of packed rows belongs to, and its number there; `sequences` for one too many.

    Every sequence begins a block of its own, so an empty one has none.
    """
    sequence, before, ahead = 0, 0, 0
    for first in range(0, sequences, SCAN):
        item = first + tl.arange(0, SCAN)
        start = tl.load(offsets_ptr + item, mask=item < sequences, other=0).to(tl.int32)
        end = tl.load(offsets_ptr + item + 1, mask=item < sequences, other=0).to(tl.int32)
        blocks = (end - start + BLOCK_M - 1) // BLOCK_M
        passed = (item < sequences) & (ahead + tl.cumsum(blocks, axis=0) <= block)
        sequence += tl.sum(passed.to(tl.int32), axis=0)
        before += tl.sum(tl.where(passed, blocks, 0), axis=0)
        ahead += tl.sum(blocks, axis=0)
    return sequence, block - before


@triton.jit
def flash_attention(
    query_ptr, key_ptr, value_ptr, out_ptr, query_positions_ptr, key_positions_ptr, bias_ptr, slopes_ptr, sinks_ptr,
    query_offsets_ptr, key_offsets_ptr, sequences,
    heads, length, keys, q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_s, bias_t,
    query_positions_b, key_positions_b, scale, softcap, window, chunk, prefix,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr,
    PREFIXED: tl.constexpr, CAPPED: tl.constexpr, ANCHORS: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; with offsets, of one sequence among `sequences` that are packed."""
    # The last queries of a causal block row have the most work: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    first_row = batch * length
    shift = 0
    if query_offsets_ptr is not None:
        sequence, block = find_sequence(query_offsets_ptr, sequences, block, BLOCK_M, 64)
        # A block too many has no rows and no keys.
        there = sequence < sequences
        first_row = tl.load(query_offsets_ptr + sequence, mask=there, other=0).to(tl.int64)
        first_key = tl.load(key_offsets_ptr + sequence, mask=there, other=0).to(tl.int64)
        length = (tl.load(query_offsets_ptr + sequence + 1, mask=there, other=0) - first_row).to(tl.int32)
        keys = (tl.load(key_offsets_ptr + sequence + 1, mask=there, other=0) - first_key).to(tl.int32)
        shift = tl.maximum(keys - length, 0)
        query_ptr += first_row * q_s
        key_ptr += first_key * k_t
        value_ptr += first_key * v_t
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    here = row.to(tl.int64)[:, None]
    query_mask = (row[:, None] < length) & (channel[None, :] < HEAD_DIM)
    source = query_ptr + batch * q_b + head * q_h + here * q_s + channel[None, :]
    query = tl.load(source, mask=query_mask, other=0.0)
    key_ptr += batch * k_b + (head // GROUPS) * k_h
    value_ptr += batch * v_b + (head // GROUPS) * v_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_b + head * bias_h
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32) + tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if query_positions_ptr is not None:
        places = query_positions_ptr + batch * query_positions_b + row
        query_at = tl.load(places, mask=row < length, other=-1).to(tl.int32)
    else:
        query_at = tl.where(row < length, row + shift, -1)
    indexed: tl.constexpr = (query_positions_ptr is None) and (key_positions_ptr is None)
    whole: tl.constexpr = indexed and not (WINDOWED or CHUNKED or PREFIXED)
    last_query = tl.max(query_at)
    first_query = tl.min(tl.where(query_at < 0, 2147483647, query_at))
    if key_positions_ptr is not None:
        key_positions_ptr += batch * key_positions_b
        start, end = keys, 0
        anchor_start, anchor_end = keys, 0
        for first in range(0, keys, 1024):
            item = first + tl.arange(0, 1024)
            key_at = tl.load(key_positions_ptr + item, mask=item < keys, other=-1).to(tl.int32)
            seen = reachable(
                key_at, first_query, last_query, window, chunk, prefix, CAUSAL, WINDOWED, CHUNKED, PREFIXED
            )
            start = tl.minimum(start, tl.min(tl.where(seen, item, keys)))
            end = tl.maximum(end, tl.max(tl.where(seen, item + 1, 0)))
            if ANCHORS > 0:
                anchored = (key_at >= 0) & (key_at < ANCHORS)
                anchor_start = tl.minimum(anchor_start, tl.min(tl.where(anchored, item, keys)))
                anchor_end = tl.maximum(anchor_end, tl.max(tl.where(anchored, item + 1, 0)))
        start = start // BLOCK_N * BLOCK_N
    else:
        start, end = 0, keys
        if CAUSAL:
            end = last_query + 1
            if PREFIXED:
                end = tl.maximum(end, prefix)
            end = tl.minimum(end, keys)
        if WINDOWED:
            start = tl.maximum(first_query - window + 1, 0) // BLOCK_N * BLOCK_N
            end = tl.minimum(end, last_query + window)
        if CHUNKED:
            start = tl.maximum(start, first_query // chunk * chunk) // BLOCK_N * BLOCK_N
            end = tl.minimum(end, (last_query // chunk + 1) * chunk)
        anchor_start, anchor_end = 0, tl.minimum(keys, ANCHORS)
    if ANCHORS > 0:
        if not CAUSAL:
            # An anchor itself sees everything.
            start = tl.where(first_query < ANCHORS, 0, start)
            end = tl.where(first_query < ANCHORS, keys, end)
        # Anchors first, then what follows behind their last block; where the two ranges meet they are one.
        anchor_end = (anchor_end + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        meet = start < anchor_end
        before = tl.where(meet, tl.minimum(anchor_start, start), anchor_start) // BLOCK_N * BLOCK_N
        total, largest, mixed = attend(
            before, anchor_end, query, query_at, slope, total, largest, mixed,
            key_ptr, value_ptr, key_positions_ptr, bias_ptr,
            keys, k_t, v_t, bias_s, bias_t, row, length, scale, softcap, window, chunk, prefix,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, CAUSAL, WINDOWED, CHUNKED, PREFIXED, CAPPED, ANCHORS, WINDOW_BLOCK,
            True, BLOCK_N,
        )  # fmt: skip
        start = tl.maximum(start, anchor_end)
    if whole:
        # Keys that every query of the block sees need no mask.
        middle = keys // BLOCK_N * BLOCK_N
        if CAUSAL:
            middle = tl.minimum(middle, (block * BLOCK_M + shift) // BLOCK_N * BLOCK_N)
        total, largest, mixed = attend(
            start, middle, query, query_at, slope, total, largest, mixed,
            key_ptr, value_ptr, key_positions_ptr, bias_ptr,
            keys, k_t, v_t, bias_s, bias_t, row, length, scale, softcap, window, chunk, prefix,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, CAUSAL, WINDOWED, CHUNKED, PREFIXED, CAPPED, ANCHORS, WINDOW_BLOCK,
            False, BLOCK_N,
        )  # fmt: skip
        start = middle
    total, largest, mixed = attend(
        start, end, query, query_at, slope, total, largest, mixed,
        key_ptr, value_ptr, key_positions_ptr, bias_ptr,
        keys, k_t, v_t, bias_s, bias_t, row, length, scale, softcap, window, chunk, prefix,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, CAUSAL, WINDOWED, CHUNKED, PREFIXED, CAPPED, ANCHORS, WINDOW_BLOCK, True,
        BLOCK_N,
    )  # fmt: skip
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) + tl.zeros([BLOCK_M], tl.float32)
        total, largest, mixed = join_sink(sink, total, largest, mixed)
    result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + ((first_row + here) * heads + head) * VALUE_DIM + value_channel[None, :]
    stored = (row[:, None] < length) & (value_channel[None, :] < VALUE_DIM)
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=stored)


def configs(device: Device, head_dim: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Tiles that keep a query block's accumulator in registers; wide heads and float32 get narrower ones."""
    wide = head_dim > 128
    if dtype == torch.float32:
        tiles = [(64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1)]
    elif device.matrix_unit == "wmma":
        # 256 registers a thread, and every operand of a wmma instruction lies twice in them.
        tiles = [(128, 32, 8, 1), (64, 32, 8, 1), (64, 32, 4, 1), (64, 16, 8, 1), (32, 32, 4, 1), (32, 16, 4, 1)]
        tiles += [(16, 16, 4, 1), (32, 16, 8, 1)]
    elif device.target.kind == "rocm":
        tiles = [(128, 64, 4, 1), (128, 32, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1)]
    elif device.matrix_unit in ("wgmma", "tcgen05"):
        tiles = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)]
        tiles += [(128, 16, 8, 2), (64, 16, 4, 2)]
    else:
        tiles = [(128, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
    kept = [tile for tile in tiles if not wide or tile[1] <= 64]
    return tuple(Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in kept)


def attention(
    run: Runner,
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    """See `graphwright.ops.attention`; the result lies in memory as `empty_result` says.

    Raises:
        BackendError: a head that is too wide, or heads that are no multiple of the key-value heads.
    """
    check_device(query=query, key=key, value=value, query_positions=query_positions, key_positions=key_positions)
    check_heads(query, key, value)
    batch, heads, length, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    q, k, v = dense(query), dense(key), dense(value)
    spread = None if bias is None else bias.expand(batch, heads, length, keys)
    out = empty_result(query, value_dim)
    bias_strides = (0, 0, 0, 0) if spread is None else spread.stride()
    arguments = {
        "query_ptr": q, "key_ptr": k, "value_ptr": v, "out_ptr": out,
        "query_positions_ptr": contiguous(query_positions), "key_positions_ptr": contiguous(key_positions),
        "bias_ptr": spread, "slopes_ptr": alibi_slopes, "sinks_ptr": sinks,
        "query_offsets_ptr": None, "key_offsets_ptr": None, "sequences": None,
        "heads": heads, "length": length, "keys": keys,
        **strides("q", q, "bhs"), **strides("k", k, "bht"), **strides("v", v, "bht"),
        **{f"bias_{letter}": stride for letter, stride in zip("bhst", bias_strides, strict=True)},
        "query_positions_b": row_stride(query_positions), "key_positions_b": row_stride(key_positions),
        "scale": float(scale), "softcap": float(softcap), "window": window, "chunk": chunk, "prefix": prefix,
    }  # fmt: skip
    mask = (causal, window, chunk, prefix, softcap, anchors, block)
    constants = _constants(head_dim, value_dim, heads // key.shape[1], *mask)
    run(
        Launch(
            flash_attention,
            arguments,
            constants,
            configs(run.device, max(head_dim, value_dim), query.dtype),
            lambda c: (cdiv(length, c["BLOCK_M"]), batch * heads),
            lambda c: _work(query, length, keys, value_dim, causal, window, anchors, c),
            matrix=query.dtype != torch.float32,
            static=_static(head_dim, value_dim),
        )
    )
    return out


def packed_attention(
    run: Runner,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
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
    """Attention within each of N sequences whose queries and keys lie one after the other; [S, H, Dv].

    A sequence's last query stands at its last key, so queries may continue keys that are already there; where queries
    outnumber keys, both begin at position 0. All else is as `graphwright.ops.attention` says.

    Args:
        run: runs the launches.
        query: [S, H, D], the queries of all sequences.
        key: [T, Hkv, D], H a multiple of Hkv.
        value: [T, Hkv, Dv].
        query_offsets: int32 or int64 [N + 1], not descending, from 0 to S: where each sequence's queries begin.
        key_offsets: the same for keys, from 0 to T.
        alibi_slopes: [H] or None.
        sinks: [H] or None.
        scale: factor on query · key.
        causal: a query sees no later key.
        window: sliding window, 0 for none.
        chunk: a query sees its own chunk of positions only, 0 for none.
        prefix: the first positions of a sequence that all its queries see although causal.
        softcap: bound of the scores, 0 for none.
        anchors: positions of a sequence that see and are seen in spite of window and chunk.
        block: positions per block of the window, 0 for single positions.

    Raises:
        BackendError: a head that is too wide, heads that are no multiple of the key-value heads, or offsets that do
            not fit the tensors; on a GPU their values are not looked at, which would wait for it.
    """
    check_device(query=query, key=key, value=value, query_offsets=query_offsets, key_offsets=key_offsets)
    check_heads(*(x.transpose(0, 1)[None] for x in (query, key, value)))
    check_offsets(query, key, query_offsets, key_offsets)
    (total, heads, head_dim), value_dim = query.shape, value.shape[2]
    sequences = query_offsets.shape[0] - 1
    q, k, v = dense(query), dense(key), dense(value)
    out = query.new_empty(total, heads, value_dim)
    arguments = {
        "query_ptr": q, "key_ptr": k, "value_ptr": v, "out_ptr": out,
        "query_positions_ptr": None, "key_positions_ptr": None, "bias_ptr": None,
        "slopes_ptr": alibi_slopes, "sinks_ptr": sinks,
        "query_offsets_ptr": query_offsets.contiguous(), "key_offsets_ptr": key_offsets.contiguous(),
        "sequences": sequences, "heads": heads, "length": 0, "keys": 0,
        "q_b": 0, "k_b": 0, "v_b": 0, **strides("q", q, "sh"), **strides("k", k, "th"), **strides("v", v, "th"),
        "bias_b": 0, "bias_h": 0, "bias_s": 0, "bias_t": 0, "query_positions_b": 0, "key_positions_b": 0,
        "scale": float(scale), "softcap": float(softcap), "window": window, "chunk": chunk, "prefix": prefix,
    }  # fmt: skip
    mask = (causal, window, chunk, prefix, softcap, anchors, block)
    constants = _constants(head_dim, value_dim, heads // key.shape[1], *mask)
    length, keys = cdiv(total, max(sequences, 1)), cdiv(key.shape[0], max(sequences, 1))
    if total == 0:
        return out
    run(
        Launch(
            flash_attention,
            arguments,
            constants,
            configs(run.device, max(head_dim, value_dim), query.dtype),
            # As many blocks as any lengths need that add up to `total`.
            lambda c: ((total + sequences * (c["BLOCK_M"] - 1)) // c["BLOCK_M"], heads),
            lambda c: _work(query, length, keys, value_dim, causal, window, anchors, c),
            matrix=query.dtype != torch.float32,
            static=_static(head_dim, value_dim),
        )
    )
    return out


def packed_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *mask: Any,
) -> Tensor:
    """`packed_attention` as one attention for each sequence; arguments as there."""
    check_offsets(query, key, query_offsets, key_offsets)
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    rows, keys = (itertools.pairwise(offsets.tolist()) for offsets in (query_offsets, key_offsets))
    for (first, last), (start, end) in zip(rows, keys, strict=True):
        parts = (query[first:last], key[start:end], value[start:end])
        at = torch.arange(last - first, device=query.device)[None] + max(end - start - (last - first), 0)
        result = semantic.reference(
            *(x.transpose(0, 1)[None] for x in parts), at, None, None, alibi_slopes, sinks, *mask
        )  # fmt: skip
        out[first:last] = result[0].transpose(0, 1)
    return out


def check_offsets(query: Tensor, key: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> None:
    """Refuses offsets that do not cut `query` and `key` into as many sequences.

    Raises:
        BackendError: lengths or dtypes that do not fit; on a CPU also values that descend or end elsewhere.
    """
    if query_offsets.ndim != 1 or query_offsets.shape != key_offsets.shape or query_offsets.shape[0] < 1:
        raise BackendError(
            f"Offsets of queries {list(query_offsets.shape)} and of keys {list(key_offsets.shape)} do not agree",
            fix="Give both one more entry than there are sequences",
        )
    for name, offsets, rows in (("query", query_offsets, query.shape[0]), ("key", key_offsets, key.shape[0])):
        if offsets.dtype not in (torch.int32, torch.int64):
            raise BackendError(f"{name}_offsets are {offsets.dtype}", fix="Give int32 or int64")
        if offsets.device.type != "cpu":
            continue
        if offsets[0] != 0 or offsets[-1] != rows or (offsets.diff() < 0).any():
            raise BackendError(
                f"{name}_offsets are {offsets.tolist()} for {rows} rows",
                fix="Let them rise from 0 to the last row's end",
            )


def _constants(
    head_dim: int, value_dim: int, groups: int,
    causal: bool, window: int, chunk: int, prefix: int, softcap: float, anchors: int, block: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "GROUPS": groups,
        "BLOCK_D": max(16, next_power_of_2(head_dim)), "BLOCK_V": max(16, next_power_of_2(value_dim)),
        "CAUSAL": causal, "WINDOWED": window > 0, "CHUNKED": chunk > 0, "PREFIXED": prefix > 0, "CAPPED": softcap > 0,
        "ANCHORS": anchors if window or chunk else 0, "WINDOW_BLOCK": block,
    }  # fmt: skip


def _static(head_dim: int, value_dim: int) -> frozenset[str]:
    return fixed(head_dim, "q_b", "q_h", "q_s", "k_b", "k_h", "k_t") | fixed(value_dim, "v_b", "v_h", "v_t")


def _work(
    query: Tensor, length: int, keys: int, value_dim: int, causal: bool, window: int, anchors: int, config: Config
) -> Work:
    head_dim = query.shape[-1]
    length = min(length, config["BLOCK_M"])
    # Half of the scores of a causal block row are never computed, as far as the block's height allows.
    seen = min(keys, keys / 2 + config["BLOCK_M"]) if causal else keys
    if window:
        seen = min(seen, config["BLOCK_M"] + (window if causal else 2 * window) + anchors)
    rounded = math.ceil(seen / config["BLOCK_N"]) * config["BLOCK_N"]
    flops = 2 * config["BLOCK_M"] * rounded * (head_dim + value_dim)
    moved = (length + CACHED * rounded) * (head_dim + value_dim) * query.element_size()
    step = config["BLOCK_N"] * (head_dim + value_dim) * query.element_size()
    return Work(flops, moved, str(query.dtype).removeprefix("torch."), step * max(1, config.num_stages - 1))


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses heads that no kernel serves.

    Raises:
        BackendError: too many channels, or heads that do not divide.
    """
    head_dim = max(query.shape[3], value.shape[3])
    if head_dim > LARGEST_HEAD:
        raise BackendError(
            f"No attention kernel has head_dim {head_dim}", fix=f"There are kernels for 1 to {LARGEST_HEAD}"
        )
    if query.shape[1] % key.shape[1]:
        raise BackendError(f"{query.shape[1]} heads are no multiple of {key.shape[1]} key-value heads")


def empty_result(query: Tensor, value_dim: int) -> Tensor:
    """Room for a result [B, H, S, Dv] whose heads lie beside each other, as the product that reads it wants them."""
    batch, heads, length, _ = query.shape
    return torch.empty(batch, length, heads, value_dim, dtype=query.dtype, device=query.device).transpose(1, 2)


def contiguous(x: Tensor | None) -> Tensor | None:
    """A dense tensor, or None for None."""
    return None if x is None else x.contiguous()


def row_stride(positions: Tensor | None) -> int:
    """Distance of the rows of positions [B|1, S]; 0 where one row serves all."""
    return 0 if positions is None or positions.shape[0] == 1 else positions.shape[1]


def _shape(run: Runner, dtype: torch.dtype, head_dim: int, positions: bool = False, **mask: Any) -> Tensor:
    query = meta(dtype, 1, 2048, 32, head_dim).transpose(1, 2)
    key = meta(dtype, 1, 2048, 8, head_dim).transpose(1, 2)
    at = meta(torch.int64, 1, 2048) if positions else None
    return attention(run, query, key, key, at, at, None, None, mask.pop("sinks", None), 0.1, True, **mask)


def _packed_shape(run: Runner, dtype: torch.dtype, head_dim: int, **mask: Any) -> Tensor:
    query, key = meta(dtype, 4096, 32, head_dim), meta(dtype, 4096, 8, head_dim)
    offsets = meta(torch.int32, 9)
    return packed_attention(run, query, key, key, offsets, offsets, None, None, 0.1, True, **mask)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "head_dim 64 causal": lambda run, dtype: _shape(run, dtype, 64),
    "head_dim 128 causal": lambda run, dtype: _shape(run, dtype, 128),
    "head_dim 128 positions": lambda run, dtype: _shape(run, dtype, 128, positions=True),
    "head_dim 128 window, softcap, sinks": lambda run, dtype: _shape(
        run, dtype, 128, window=1024, softcap=30.0, sinks=meta(dtype, 32)
    ),
    "head_dim 128 window and anchors": lambda run, dtype: _shape(
        run, dtype, 128, positions=True, window=256, anchors=4
    ),
    "head_dim 80 causal": lambda run, dtype: _shape(run, dtype, 80),
    "head_dim 128 packed": lambda run, dtype: _packed_shape(run, dtype, 128),
    "head_dim 80 packed, window, softcap": lambda run, dtype: _packed_shape(run, dtype, 80, window=512, softcap=30.0),
    "head_dim 256 causal": lambda run, dtype: _shape(run, dtype, 256),
}
