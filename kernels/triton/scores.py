"""What attention kernels share: which key a query sees, and what is added to a score.

The rules are those of `graphwright.ops.attention.visible_keys`.
"""

import triton
import triton.language as tl

from graphwright.kernels.triton.rounding import tanh

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""Powers of two are what the hardware computes; scores are multiplied with this once."""


@triton.jit
def visible(
    query_at, key_at, window, chunk, prefix,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, PREFIXED: tl.constexpr,
    ANCHORS: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Mask [M, N] from int32 positions [M] and [N]; a negative position is padding."""
    query, key = query_at[:, None], key_at[None, :]
    seen = (key >= 0) & (query >= 0)
    if CAUSAL:
        if PREFIXED:
            seen = seen & ((key <= query) | (key < prefix))
        else:
            seen = seen & (key <= query)
    near = (key >= 0) & (query >= 0)
    if WINDOWED:
        if WINDOW_BLOCK > 0:
            apart = (query // WINDOW_BLOCK - key // WINDOW_BLOCK) * WINDOW_BLOCK
        else:
            apart = query - key
        near = near & (apart < window) & (-apart < window)
    if CHUNKED:
        near = near & (query // chunk == key // chunk)
    if ANCHORS > 0:
        near = near | (key < ANCHORS) | (query < ANCHORS)
    return seen & near


@triton.jit
def reachable(
    key_at, first_query, last_query, window, chunk, prefix,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, PREFIXED: tl.constexpr,
):  # fmt: skip
    """Which keys [N] a query at a position from `first_query` to `last_query` might see: never too few.

    Anchors are left out: they are another range of keys. A block of the window lies within as many single positions.
    """
    seen = (key_at >= 0) & (last_query >= 0)
    if CAUSAL:
        if PREFIXED:
            seen = seen & ((key_at <= last_query) | (key_at < prefix))
        else:
            seen = seen & (key_at <= last_query)
    if WINDOWED:
        seen = seen & (key_at > first_query - window) & (key_at < last_query + window)
    if CHUNKED:
        seen = seen & (key_at // chunk >= first_query // chunk) & (key_at // chunk <= last_query // chunk)
    return seen


@triton.jit
def in_powers_of_two(scores, scale, softcap, bias, slope, query_at, key_at, CAPPED: tl.constexpr):
    """Products [M, N] as exponents of two: scaled, capped, biased. `bias` [M, N] and `slope` [M] may be None."""
    if CAPPED:
        scores = softcap * tanh(scores * scale / softcap)
        factor = LOG2E
    else:
        factor = scale * LOG2E
    scores = scores * factor
    if bias is not None:
        scores += bias.to(tl.float32) * LOG2E
    if slope is not None:
        distance = (key_at[None, :] - query_at[:, None]).to(tl.float32)
        scores += (slope * LOG2E)[:, None] * distance
    return scores


@triton.jit
def accumulate(scores, values, total, largest, mixed):
    """One step of the online softmax over exponents of two [M, N] and values [N, V]."""
    peak = tl.maximum(largest, tl.max(scores, axis=1))
    # A row that has seen nothing stays at -inf, and -inf - -inf is no number.
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    powers = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(largest - origin)
    total = total * shrink + tl.sum(powers, axis=1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(powers.to(values.dtype), values, mixed, input_precision="ieee")
    return total, peak, mixed


@triton.jit
def join_sink(sink, total, largest, mixed):
    """Adds one logit [M] without a value to the softmax's denominator."""
    sink = sink.to(tl.float32) * LOG2E
    peak = tl.maximum(largest, sink)
    shrink = tl.exp2(largest - peak)
    return total * shrink + tl.exp2(sink - peak), peak, mixed * shrink[:, None]
