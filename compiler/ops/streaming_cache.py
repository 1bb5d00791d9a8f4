"""The first tokens of a text and a ring of the last ones, with positions inside the cache (StreamingLLM).

Xiao et al. 2023, arXiv:2309.17453. A cache of A sinks and a ring of W slots holds keys before their rotation; position
p < A lies in slot p, any other in slot A + (p - A) % W. A query sees the sinks and the last W tokens, itself among
them, as if they were one text: what is between sinks and window does not count as distance.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.ops.attention import attention
from graphwright.ops.rope import rope


@op
def streaming_slots(positions: Tensor, sinks: int, window: int) -> Tensor:
    """The slot of each new token, [B, S]; -1 for padding and for what later tokens of the same call push out."""
    last = positions.amax(1, keepdim=True)
    kept = (positions < sinks) | (positions > last - window)
    slots = torch.where(positions < sinks, positions, sinks + (positions - sinks) % window)
    return torch.where(kept & (positions >= 0), slots, -1)


@op
def streaming_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    attention_sinks: Tensor | None,
    scale: float,
    sinks: int,
    window: int,
    scaling: float = 1.0,
    interleaved: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of new tokens over the cache as it was before them and over each other.

    Args:
        query: [B, H, S, D], not rotated.
        key_cache: [B, Hkv, A + W + 1, D], not rotated; the last slot is scratch.
        value_cache: [B, Hkv, A + W + 1, Dv].
        key: [B, Hkv, S, D], not rotated.
        value: [B, Hkv, S, Dv].
        positions: int64 [B, S], places in the text, of any size; -1 for padding.
        inv_freq: as in `rope`.
        attention_sinks: [H] or None, the logits that `attention` calls sinks.
        scale: factor on query · key.
        sinks: A.
        window: W.
        scaling: as in `rope`.
        interleaved: as in `rope`.
        softcap: as in `attention`.

    Returns:
        [B, H, S, Dv]; zeros for padding.
    """
    size = sinks + window
    places = torch.cat([_held(positions, sinks, window), positions], 1)
    keys = torch.cat([key_cache[:, :, :size], key], 2)
    values = torch.cat([value_cache[:, :, :size], value], 2)
    # Between a query and the window distances are those of the text, between it and the sinks those of the cache. Two
    # rotations side by side give every pair its own; both start near zero, however long the text is.
    start = (_first(positions) - size).clamp(min=0)
    is_sink = ((places >= 0) & (places < sinks))[:, None, :, None]

    def turned(x: Tensor, at: Tensor) -> Tensor:
        return rope.reference(x, at, inv_freq, scaling, interleaved)

    near, far = (places - start).clamp(min=0), places.clamp(0, size - 1)
    keys = torch.cat(
        [torch.where(is_sink, 0.0, turned(keys, near)), torch.where(is_sink, turned(keys, far), 0.0)], -1
    ).to(query.dtype)
    query_near, query_far = (positions - start).clamp(min=0), positions.clamp(0, size - 1)
    both = torch.cat([turned(query, query_near), turned(query, query_far)], -1)
    asked, there = positions[:, :, None], places[:, None, :]
    visible = (asked >= 0) & (there >= 0) & (there <= asked) & ((there < sinks) | (asked - there < window))
    bias = torch.zeros(visible.shape, device=query.device).masked_fill(~visible, float("-inf"))[:, None]
    options = (bias, None, attention_sinks, scale, False, 0, 0, 0, softcap)
    return attention.reference(both, keys, values, None, None, *options)


def _first(positions: Tensor) -> Tensor:
    """Tokens before this call, [B, 1]; 0 for a row of padding."""
    first = torch.where(positions >= 0, positions, 1 << 40).amin(1, keepdim=True)
    return torch.minimum(first, positions.amax(1, keepdim=True) + 1)


def _held(positions: Tensor, sinks: int, window: int) -> Tensor:
    """The position that each slot held before this call, [B, A + W]; -1 for an empty slot."""
    past = _first(positions) - 1
    sink = torch.arange(sinks, device=positions.device)[None]
    ring = past - (past - sinks - torch.arange(window, device=positions.device)[None]) % window
    return torch.cat([torch.where(sink <= past, sink, -1), torch.where(ring >= sinks, ring, -1)], 1)


@streaming_slots.cost
def _slots_cost(positions: TensorInfo, sinks: int, window: int) -> Cost:
    return Cost(flops=6 * positions.numel)


@streaming_slots.samples
def _slots_samples(dtype: torch.dtype) -> Iterator[Sample]:
    yield Sample((torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [-1, 9, 10, 11, 12, 13, 14, -1]]), 2, 3))


@streaming_attention.cost
def _cost(query: TensorInfo, key_cache: TensorInfo, *_rest: object, **_more: object) -> Cost:
    batch, heads, length, head_dim = query.shape
    return Cost(flops=6 * batch * heads * length * (key_cache.shape[2] + length) * head_dim)


@streaming_attention.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    for start in (0, 900):
        query, key, value = (torch.randn(2, h, 4, 8, dtype=dtype) for h in (4, 2, 2))
        caches = [torch.randn(2, 2, 8, 8, dtype=dtype) for _ in range(2)]
        positions = torch.stack([torch.arange(start, start + 4), torch.arange(4) - 1])
        yield Sample((query, *caches, key, value, positions, inv_freq, None, 0.3, 2, 5), note=f"from {start} on")
