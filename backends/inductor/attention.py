"""Attention for Inductor: reductions over the cache for single tokens, the flash kernel for prompts."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphwright.backends.inductor.barrier import realize
from graphwright.ops.attention import attention as attention_op
from graphwright.ops.attention import default_positions, visible_keys


def attention_by_reduction(
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
    """Attention of few queries: every key and value is read once, as it lies in the cache."""
    batch, heads, length, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    split = (kv_heads, heads // kv_heads)
    query_at, key_at = default_positions(query_positions, query), default_positions(key_positions, key)
    scaled = realize((query.float() * scale).unflatten(1, split))
    scores = (scaled[:, :, :, :, None] * key.float()[:, :, None, None]).sum(-1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float().expand(batch, heads, length, keys).unflatten(1, split)
    if alibi_slopes is not None:
        distance = (key_at[:, None, :] - query_at[:, :, None]).float()
        scores = scores + alibi_slopes.float().view(1, *split, 1, 1) * distance[:, None, None]
    limits: dict[str, Any] = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix}
    visible = visible_keys(query_at, key_at, anchors=anchors, block=block, **limits)
    scores = realize(scores.masked_fill(~visible[:, None, None], float("-inf")))
    weights = realize(_softmax(scores, None if sinks is None else sinks.float().view(1, *split, 1, 1)))
    mixed = (weights[..., None] * value.float()[:, :, None, None]).sum(-2)
    return realize(mixed.flatten(1, 2).to(query.dtype))


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last axis, zeros for a row that sees nothing, with one more logit where there is a sink."""
    largest = scores.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    if sink is not None:
        largest = torch.maximum(largest, sink)
    powers = torch.exp(scores - largest)
    total = powers.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0) if sink is None else total + torch.exp(sink - largest)
    return powers / total


def attention_by_flash(
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
    """Attention of many queries through `scaled_dot_product_attention`, or the reference where that cannot say it."""
    limits: dict[str, Any] = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix}
    limits |= {"anchors": anchors, "block": block}
    if softcap or sinks is not None:
        extras = (query_positions, key_positions, bias, alibi_slopes, sinks)
        result: Tensor = attention_op.reference(query, key, value, *extras, scale, softcap=softcap, **limits)
        return result
    grouped = query.shape[1] != key.shape[1]
    indexed = query_positions is None and key_positions is None
    if indexed and not (window or chunk or prefix) and bias is None and alibi_slopes is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    query_at, key_at = default_positions(query_positions, query), default_positions(key_positions, key)
    mask = visible_keys(query_at, key_at, **limits)[:, None]
    if bias is not None or alibi_slopes is not None:
        mask = _added(bias, alibi_slopes, query_at, key_at).masked_fill(~mask, float("-inf"))
    mask = mask.expand(query.shape[0], -1, -1, -1)
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def _added(bias: Tensor | None, slopes: Tensor | None, query_at: Tensor, key_at: Tensor) -> Tensor:
    """What is added to the scores, float32 [B|1, H|1, S, T]."""
    distance = (key_at[:, None, :] - query_at[:, :, None]).float()[:, None]
    total = torch.zeros_like(distance) if slopes is None else slopes.float()[None, :, None, None] * distance
    return total if bias is None else total + bias.float()
