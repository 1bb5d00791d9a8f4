"""Attention that also says how much each key was attended to, over keys that differ from head to head."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def attention_with_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    count_low: bool = False,
    last: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of `query` over `key` and `value`, and the attention that each key received.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        query_positions: int64 [B, S]; -1 for padding.
        key_positions: int64 [B, Hkv, T]; -1 where there is no key.
        alibi_slopes: [H] or None, as in `attention`.
        sinks: [H] or None, as in `attention`.
        scale: factor on query · key.
        softcap: as in `attention`.
        count_low: count the queries whose weight on a key is below the mean of those they see, instead of adding
            the weights up.
        last: only the last so many queries of each row say how much; 0 for all.

    Returns:
        [B, H, S, Dv] in the dtype of `query`, and float32 [B, Hkv, T]: summed over queries and over the heads that
        share a key.
    """
    kv_heads = key.shape[1]
    split = (kv_heads, query.shape[1] // kv_heads)
    grouped = query.float().unflatten(1, split)
    scores = grouped @ key.float().unsqueeze(2).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query_at, key_at = query_positions[:, None, None, :, None], key_positions[:, :, None, None, :]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float().view(1, *split, 1, 1) * (key_at - query_at).float()
    visible = (key_at >= 0) & (query_at >= 0) & (key_at <= query_at)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, *split, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = torch.ops.aten._safe_softmax.default(scores, -1)
    out = (weights @ value.float().unsqueeze(2)).flatten(1, 2).to(query.dtype)
    seen = visible.sum(-1, keepdim=True)
    mass = (visible & (weights < 1 / seen)).float() if count_low else weights
    if last:
        newest = query_positions.amax(1)[:, None, None, None, None]
        mass = mass * (query_at > newest - last)
    return out, mass.sum((2, 3))


@attention_with_mass.cost
def _cost(query: TensorInfo, key: TensorInfo, value: TensorInfo, *_rest: object, **_more: object) -> Cost:
    batch, heads, length, head_dim = query.shape
    return Cost(flops=2 * batch * heads * length * key.shape[2] * (head_dim + value.shape[3]))


@attention_with_mass.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    query, key, value = (torch.randn(2, h, t, 8, dtype=dtype) for h, t in ((4, 3), (2, 6), (2, 6)))
    query_at = torch.tensor([[3, 4, 5], [-1, 0, 1]])
    key_at = torch.tensor([[[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], [[-1, -1, 0, 1, -1, -1]] * 2])
    tensors = (query, key, value, query_at, key_at)
    yield Sample((*tensors, None, None, 0.3), note="heads with keys of their own, padding")
    yield Sample((*tensors, torch.rand(4), torch.randn(4), 0.3, 2.0, False, 2), note="alibi, sinks, softcap, last")
    yield Sample((*tensors, None, None, 0.3, 0.0, True), note="counts")
