"""The ops over KIVI caches that a lowered program calls; see `graphwright.backends.triton.ops`.

What a token's place is follows from `spans` int32 [B, 3], which `token_spans` finds once for all layers.
"""

from typing import Any

import torch
from torch import Tensor

from graphwright import ops
from graphwright.backends.triton.ops import define
from graphwright.kernels.triton import decode_attention, flash_attention, kivi, kivi_attention
from graphwright.kernels.triton.kivi import Side
from graphwright.kernels.triton.launch import Runner
from graphwright.ops import kivi_cache


@define(kivi.token_spans)
def token_spans(positions: Tensor) -> Tensor:
    """Tokens before a call and after it, and the first column that is one, of positions int64 [B, S]: int32 [B, 3]."""
    return torch.cat(kivi_cache.token_spans(positions), dim=1).int()


def _update(
    run: Runner, codes: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, new: Tensor, positions: Tensor,
    spans: Tensor, *options: Any,
) -> None:  # fmt: skip
    kivi.update(run, Side(codes, scale, zero, residual, new, *options), positions, spans)


@define(_update, mutates=("codes", "scale", "zero", "residual"))
def kivi_cache_update(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    residual: Tensor,
    new: Tensor,
    positions: Tensor,
    spans: Tensor,
    bits: int,
    group_size: int,
    per_channel: bool,
) -> None:
    """See `graphwright.ops.kivi_update`."""
    if not isinstance(codes, torch._subclasses.FakeTensor):
        ops.kivi_update.reference(codes, scale, zero, residual, new, positions, bits, group_size, per_channel)


def _read(
    run: Runner, codes: Tensor, scale: Tensor, zero: Tensor, residual: Tensor, new: Tensor, positions: Tensor,
    spans: Tensor, keys: int, *options: Any,
) -> Tensor:  # fmt: skip
    return kivi.read(run, Side(codes, scale, zero, residual, new, *options), spans, keys)


@define(_read)
def read_kivi_cache(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    residual: Tensor,
    new: Tensor,
    positions: Tensor,
    spans: Tensor,
    keys: int,
    bits: int,
    group_size: int,
    per_channel: bool,
) -> Tensor:
    """See `graphwright.ops.kivi_read`."""
    if isinstance(codes, torch._subclasses.FakeTensor):
        return new.new_empty((new.shape[0], new.shape[1], keys, new.shape[3]))
    options = (keys, bits, group_size, per_channel)
    made: Tensor = ops.kivi_read.reference(codes, scale, zero, residual, new, positions, *options)
    return made.contiguous()


def _attend(
    run: Runner,
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    key_residual: Tensor,
    key: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    value_residual: Tensor,
    value: Tensor,
    positions: Tensor,
    spans: Tensor,
    keys: int,
    key_bits: int,
    key_group: int,
    value_bits: int,
    value_group: int,
    *rest: Any,
) -> Tensor:
    sides = (
        Side(key_codes, key_scale, key_zero, key_residual, key, key_bits, key_group, True),
        Side(value_codes, value_scale, value_zero, value_residual, value, value_bits, value_group, False),
    )
    if query.shape[1] // key.shape[1] * query.shape[2] <= decode_attention.MOST_ROWS:
        return kivi_attention.attention(run, query, *sides, spans, keys, *rest)
    held = (kivi.read(run, side, spans, keys) for side in sides)
    return flash_attention.attention(run, query, *held, *rest)


@define(_attend)
def attend_kivi_cache(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    key_residual: Tensor,
    key: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    value_residual: Tensor,
    value: Tensor,
    positions: Tensor,
    spans: Tensor,
    keys: int,
    key_bits: int,
    key_group: int,
    value_bits: int,
    value_group: int,
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
    """`graphwright.ops.attention` over two KIVI caches, keys per channel and values per token.

    Few queries read the caches where they lie; many read them once into floating point. `key` and `value` are the new
    tokens [B, Hkv, S, D] at `positions` [B, S]; `keys` is T. The other arguments are those of
    `graphwright.ops.kivi_read`, once for each side, and of `graphwright.ops.attention`; the result is [B, H, S, Dv] in
    the dtype of `query`.
    """
    out = flash_attention.empty_result(query, value.shape[3])
    if isinstance(query, torch._subclasses.FakeTensor):
        return out
    key_side = (key_codes, key_scale, key_zero, key_residual, key)
    value_side = (value_codes, value_scale, value_zero, value_residual, value)
    held = (
        ops.kivi_read.reference(*key_side, positions, keys, key_bits, key_group, True),
        ops.kivi_read.reference(*value_side, positions, keys, value_bits, value_group, False),
    )
    options = (query_positions, key_positions, bias, alibi_slopes, sinks, scale, causal)
    return out.copy_(ops.attention.reference(query, *held, *options, window, chunk, prefix, softcap, anchors, block))
