"""Scaled dot-product attention whose mask is a meaning, not a matrix (Vaswani et al. 2017, arXiv:1706.03762).

Grouped key-value heads are native (Ainslie et al. 2023, arXiv:2305.13245). Which key a query may see follows from
their positions, so padding, ragged batches and caches with arbitrary slot order are all the same case:

    visible(q, k) = k >= 0                                  a key at position -1 is padding or an empty slot
                and (k <= q or k < prefix)        if causal
                and (near(q, k) or q < anchors or k < anchors)
    near(q, k)    = |q - k| < window               if window     (causal: the last `window` keys, self included)
                and q // chunk == k // chunk       if chunk

With `block` the distance of the window is one between blocks: |q // block - k // block| * block < window. So window and
anchors are the sinks and the window of StreamingLLM (Xiao et al. 2024, arXiv:2309.17453), or the local and global
attention of Longformer (Beltagy et al. 2020, arXiv:2004.05150) and, with blocks, of Big Bird (Zaheer et al. 2020,
arXiv:2007.14062).

A query that sees no key yields zeros; a bias of -inf hides a key as well.
"""

from collections.abc import Iterator

import sympy
import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


def visible_keys(
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool,
    window: int,
    chunk: int,
    prefix: int,
    anchors: int = 0,
    block: int = 0,
) -> Tensor:
    """Bool [B|1, S, T] from positions [B|1, S] and [B|1, T]: which key each query may see."""
    query = query_positions[:, :, None]
    key = key_positions[:, None, :]
    visible = (key >= 0) & (query >= 0)
    if causal:
        before = key <= query
        visible = visible & (before | (key < prefix) if prefix else before)
    if not window and not chunk:
        return visible
    near = torch.ones((), dtype=torch.bool, device=visible.device)
    if window:
        distance = (query // block - key // block).abs() * block if block else (query - key).abs()
        near = near & (distance < window)
    if chunk:
        near = near & (query // chunk == key // chunk)
    if anchors:
        near = near | (key < anchors) | (query < anchors)
    return visible & near


def default_positions(positions: Tensor | None, like: Tensor) -> Tensor:
    """Positions as given, else 0, 1, 2 … along the sequence of `like` [B, H, S, D], as [1, S]."""
    if positions is not None:
        return positions
    return torch.arange(like.shape[2], device=like.device)[None, :]


@op
def attention(
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
    """Attention of `query` over `key` and `value`; scores and softmax in float32.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, T, D], H a multiple of Hkv; query head h reads key-value head h * Hkv // H.
        value: [B, Hkv, T, Dv].
        query_positions: int64 [B|1, S]; None: 0 … S-1. A negative position is padding and yields zeros.
        key_positions: int64 [B|1, T]; None: 0 … T-1. A negative position is never seen.
        bias: added to the scaled scores, broadcastable to [B, H, S, T].
        alibi_slopes: [H]; adds slope * (key position - query position) (Press et al. 2022, arXiv:2108.12409).
        sinks: [H]; one more logit per head in the softmax's denominator that carries no value.
        scale: factor on query · key.
        causal: a query sees no later key.
        window: sliding window, 0 for none.
        chunk: a query sees its own chunk of positions only, 0 for none.
        prefix: the first `prefix` positions are seen by every query although causal.
        softcap: scores become softcap * tanh(scores / softcap), 0 for none (Gemma 2, arXiv:2408.00118).
        anchors: the first `anchors` positions see and are seen in spite of window and chunk, not of causality.
        block: positions per block, in whole numbers of which the window counts; 0 for single positions.

    Returns:
        [B, H, S, Dv] in the dtype of `query`.
    """
    batch, heads, length, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    query_at = default_positions(query_positions, query)
    key_at = default_positions(key_positions, key)
    grouped = query.float().unflatten(1, (kv_heads, groups))
    scores = grouped @ key.float().unsqueeze(2).transpose(-1, -2) * scale
    scores = scores.flatten(1, 2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        distance = (key_at[:, None, :] - query_at[:, :, None]).float()
        scores = scores + alibi_slopes.float()[None, :, None, None] * distance[:, None]
    limits = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix}
    visible = visible_keys(query_at, key_at, anchors=anchors, block=block, **limits)[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[None, :, None, None].expand(batch, heads, length, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :keys]
    else:
        weights = torch.ops.aten._safe_softmax.default(scores, -1)
    grouped_weights = weights.unflatten(1, (kv_heads, groups))
    return (grouped_weights @ value.float().unsqueeze(2)).flatten(1, 2).to(query.dtype)


OPTIONS = ("scale", "causal", "window", "chunk", "prefix", "softcap", "anchors", "block")
"""Names of the arguments that are no tensors, in order."""


@attention.cost
def _cost(query: TensorInfo, key: TensorInfo, value: TensorInfo, *rest: object, **more: object) -> Cost:
    batch, heads, length, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    given = dict(zip(OPTIONS, rest[5:], strict=False)) | more
    causal, window, anchors = (int(given.get(name, 0)) for name in ("causal", "window", "anchors"))  # type: ignore[call-overload]
    if not window:
        return Cost(flops=2 * batch * heads * length * keys * (head_dim + value_dim))
    # What kernels that skip blocks compute and read; a block of queries reads the keys of its window once.
    reach = (window if causal else 2 * window - 1) + anchors
    seen, read = sympy.Min(keys, reach), sympy.Min(keys, reach + length)
    moved = query.bytes + batch * heads * length * value_dim * query.dtype.itemsize
    moved += (key.bytes + value.bytes) / keys * read
    return Cost(flops=2 * batch * heads * length * seen * (head_dim + value_dim), bytes=moved)


@attention.fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *_rest: object, **_more: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@attention.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int) -> tuple[Tensor, ...]:
        return (
            torch.randn(batch, heads, queries, dim, dtype=dtype),
            torch.randn(batch, kv_heads, keys, dim, dtype=dtype),
            torch.randn(batch, kv_heads, keys, dim, dtype=dtype),
        )

    nothing = (None,) * 5
    yield Sample((*make(1, 3, 1, 7, 7, 80), *nothing, 0.11, True), note="one kv head, head_dim 80")
    yield Sample((*make(2, 8, 1, 1, 9, 96), *nothing, 0.1, False), note="one query, ratio 8")
    yield Sample((*make(2, 4, 4, 9, 9, 16), *nothing, 0.25, True, 3), note="sliding window")
    yield Sample((*make(1, 2, 2, 9, 9, 16), *nothing, 0.25, True, 0, 4), note="chunked")
    yield Sample((*make(1, 2, 2, 9, 9, 16), *nothing, 0.25, True, 0, 0, 3), note="prefix")
    yield Sample((*make(1, 2, 1, 5, 5, 16), *nothing, 0.25, True, 0, 0, 0, 2.0), note="softcap")
    yield Sample((*make(1, 2, 1, 9, 9, 16), *nothing, 0.25, True, 3, 0, 0, 0.0, 2), note="sinks and window")
    yield Sample((*make(1, 2, 2, 11, 11, 16), *nothing, 0.25, True, 4, 0, 0, 0.0, 3, 2), note="local and global blocks")
    yield Sample((*make(1, 2, 2, 11, 11, 16), *nothing, 0.25, False, 4, 0, 0, 0.0, 1, 2), note="blocks, both ways")
    yield Sample((*make(1, 2, 2, 9, 9, 16), *nothing, 0.25, True, 0, 3, 0, 0.0, 2), note="chunks and anchors")
    query, key, value = make(2, 4, 2, 3, 6, 8)
    query_at = torch.tensor([[3, 4, 5], [-1, 0, 1]])
    key_at = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, -1, -1, -1, 0, 1]])
    slopes, sinks = torch.tensor([0.5, 0.25, 0.125, 0.0625]), torch.randn(4)
    bias = torch.randn(1, 4, 3, 6)
    yield Sample(
        (query, key, value, query_at, key_at, None, slopes, None, 0.3, True),
        note="left padding, alibi, a row that sees nothing",
    )
    yield Sample((query, key, value, query_at, key_at, bias, None, sinks, 0.3, True), note="bias and sinks")
