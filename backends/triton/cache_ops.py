"""The ops over paged and quantized caches that a lowered program calls; see `graphwright.backends.triton.ops`."""

from typing import Any

import torch
from torch import Tensor

from graphwright import ops, packing
from graphwright.backends.triton.ops import define
from graphwright.kernels.triton import cache_codes, decode_attention, flash_attention, rope
from graphwright.kernels.triton.decode_attention import Codes, Pages
from graphwright.kernels.triton.launch import Runner


@define(rope.paged_update, mutates=("pool",))
def paged_cache_update(
    pool: Tensor,
    x: Tensor,
    slots: Tensor,
    table: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    scaling: float,
    interleaved: bool,
) -> None:
    """Writes x, rotated where `inv_freq` is given, into blocks."""
    if not isinstance(pool, torch._subclasses.FakeTensor):
        ops.paged_update.reference(pool, _rotated(x, positions, inv_freq, scaling, interleaved), slots, table)


@define(cache_codes.update, mutates=("codes", "scale"))
def quantized_cache_update(
    codes: Tensor,
    scale: Tensor,
    x: Tensor,
    slots: Tensor,
    table: Tensor | None,
    format: str,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    scaling: float,
    interleaved: bool,
) -> None:
    """Writes x, rotated where `inv_freq` is given, as codes with a scale per token, into rows or blocks."""
    if isinstance(codes, torch._subclasses.FakeTensor):
        return
    rotated = _rotated(x, positions, inv_freq, scaling, interleaved)
    for held, part in zip((codes, scale), ops.quantize_tokens.reference(rotated, format), strict=True):
        if table is None:
            ops.kv_cache_update.reference(held, part, slots)
        else:
            ops.paged_update.reference(held, part, slots, table)


@define(cache_codes.read)
def read_cache(
    source: Tensor, scale: Tensor | None, table: Tensor | None, keys: int, format: str, dtype: torch.dtype
) -> Tensor:
    """The first `keys` slots of codes or numbers [B, Hkv, keys, D], out of rows or blocks."""
    if isinstance(source, torch._subclasses.FakeTensor):
        width = source.shape[3] * 8 // packing.FORMATS[format].bits if format else source.shape[3]
        batch = source.shape[0] if table is None else table.shape[0]
        return source.new_empty((batch, source.shape[1], keys, width), dtype=dtype)
    held = [_gathered(part, table, keys) for part in (source, scale) if part is not None]
    if not format:
        return held[0].to(dtype).clone(memory_format=torch.contiguous_format)
    made: Tensor = ops.dequantize_tokens.reference(*held, format, dtype)
    return made.contiguous()


def _attend(
    run: Runner,
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    table: Tensor | None,
    keys: int,
    format: str,
    *rest: Any,
) -> Tensor:
    if query.shape[1] // key.shape[1] * query.shape[2] > decode_attention.MOST_ROWS:
        sides = ((key, key_scale), (value, value_scale))
        held = (cache_codes.read(run, codes, scale, table, keys, format, query.dtype) for codes, scale in sides)
        return flash_attention.attention(run, query, *held, *rest)
    pages = None if table is None else Pages(table, keys=keys)
    parts = (_held(run, key, key_scale, format), _held(run, value, value_scale, format))
    return decode_attention.attention(run, query, *parts, *rest, pages=pages)


@define(_attend)
def cached_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    table: Tensor | None,
    keys: int,
    format: str,
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
    """`graphwright.ops.attention` over caches in blocks, in codes, or both.

    Few queries read codes and blocks where they lie; many read them once into floating point, as `read_cache` does.

    Key and value are [B, Hkv, T, D], codes of that in a `format` of `quantize_tokens`, or blocks [N, Hkv, block, …] of
    either, found through `table` int64 [B, M]; scales are float32, likewise with a last dimension of 1, and None for
    floating point. `keys` is T. Everything else is as in `graphwright.ops.attention`; the result is [B, H, S, D] in the
    dtype of `query`.
    """
    width = value.shape[3] * 8 // packing.FORMATS[format].bits if format else value.shape[3]
    out = flash_attention.empty_result(query, width)
    if isinstance(query, torch._subclasses.FakeTensor):
        return out
    read = read_cache.reference
    held = [
        read(codes, step, table, keys, format, query.dtype) for codes, step in ((key, key_scale), (value, value_scale))
    ]
    positions = (query_positions, key_positions, bias, alibi_slopes, sinks, scale, causal)
    return out.copy_(ops.attention.reference(query, *held, *positions, window, chunk, prefix, softcap, anchors, block))


def _held(run: Runner, codes: Tensor, scale: Tensor | None, format: str) -> Tensor | Codes:
    if scale is None:
        return codes
    return Codes(cache_codes.in_fp8(codes, format, run), scale.squeeze(-1), bits=packing.FORMATS[format].bits)


def _gathered(cache: Tensor, table: Tensor | None, keys: int) -> Tensor:
    gathered: Tensor = cache[:, :, :keys] if table is None else ops.paged_read.reference(cache, table, keys)
    return gathered


def _rotated(
    x: Tensor, positions: Tensor | None, inv_freq: Tensor | None, scaling: float, interleaved: bool
) -> Tensor:  # fmt: skip
    return x if inv_freq is None else ops.rope.reference(x, positions, inv_freq, scaling, interleaved)
