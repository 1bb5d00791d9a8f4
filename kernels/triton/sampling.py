"""Softmax over a vocabulary, and choosing the next token from logits without sorting or storing anything of that size.

`graphwright.ops.sample_tokens` on the device: only as many whole numbers as there are rows leave it. What top-k and
top-p keep is found by bisection over the bits of a float, whose order is that of whole numbers: each step of it is one
pass over a row, which the second-level cache holds. The draw inverts the cumulative distribution, as the op does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    cdiv,
    check_device,
    meta,
    next_power_of_2,
    rows_of,
)

SPAN = 4096
"""Tokens of the vocabulary that one block looks through for the most likely one."""

NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
"""Above every token."""


@triton.jit
def softmax_rows(x_ptr, out_ptr, width, x_row, scale, BLOCK: tl.constexpr):
    """One row: a pass for its largest value and sum together, and a pass that writes."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column, mask=column < width, other=float("-inf")).to(tl.float32) * scale
        peak = tl.maximum(largest, x)
        origin = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(largest - origin) + tl.exp(x - origin)
        largest = peak
    peak = tl.max(largest, axis=0)
    everything = tl.sum(total * tl.exp(largest - peak), axis=0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column, mask=column < width, other=float("-inf")).to(tl.float32) * scale
        result = tl.exp(x - peak) / everything
        tl.store(out_ptr + row * width + column, result.to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def best_part(
    x_ptr, best_ptr, index_ptr, width, x_row, parts, SPAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The most likely token of one span of one row, and its logit; above all others and -1 where there is NaN."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for first in range(part * SPAN, (part + 1) * SPAN, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
        broken = x != x
        better = (x > best) | broken
        best = tl.where(broken, float("inf"), tl.where(better, x, best))
        where = tl.where(broken, -1, tl.where(better, column, where))
    peak = tl.max(best, axis=0)
    # The first of equals, as argmax has it.
    index = tl.min(tl.where(best == peak, where, NOWHERE), axis=0)
    tl.store(best_ptr + row * parts + part, peak)
    tl.store(index_ptr + row * parts + part, index)


@triton.jit
def best_of_parts(best_ptr, index_ptr, out_ptr, parts, BLOCK_PARTS: tl.constexpr):
    """The most likely token of a row's spans."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    best = tl.load(best_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    index = tl.load(index_ptr + row * parts + part, mask=part < parts, other=NOWHERE)
    peak = tl.max(best, axis=0)
    tl.store(out_ptr + row, tl.min(tl.where(best == peak, index, NOWHERE), axis=0).to(tl.int64))


@triton.jit
def ordered(x):
    """Int64 numbers in the order of float32 `x`; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def scaled(at, first, width, temperature, BLOCK: tl.constexpr):
    """Float32 logits of a block of a row over the temperature; -inf beyond the last."""
    column = first + tl.arange(0, BLOCK)
    x = tl.load(at + column, mask=column < width, other=float("-inf")).to(tl.float32)
    return tl.math.div_rn(x, tl.zeros_like(x) + temperature), column


@triton.jit
def count_from(at, width, temperature, bound, BLOCK: tl.constexpr):
    """How many tokens of a row are at `bound` or above."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, width, BLOCK):
        x, column = scaled(at, first, width, temperature, BLOCK)
        count += ((column < width) & (ordered(x) >= bound)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def mass_from(at, width, temperature, largest, bound, BLOCK: tl.constexpr):
    """Weights of the tokens at `bound` or above, that of the most likely one being 1."""
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        x, _ = scaled(at, first, width, temperature, BLOCK)
        mass += tl.where(ordered(x) >= bound, tl.exp(x - largest), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def kept_weights(x, largest, floor, border, equals, seen, min_p):
    """Float64 weights of a block, 0 where filters remove a token, and how many at the border of top-p came so far.

    Of those at the border, the first `equals` of the row stay.
    """
    order = ordered(x)
    level = (order == border).to(tl.int32)
    rank = seen + tl.cumsum(level, axis=0) - level
    weight = tl.exp(x - largest)
    kept = (order >= floor) & (weight >= min_p) & ((order > border) | ((level == 1) & (rank < equals)))
    return tl.where(kept, weight, 0.0).to(tl.float64), seen + tl.sum(level, axis=0)


@triton.jit
def draw_row(
    x_ptr, uniform_ptr, out_ptr, width, x_row, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr
):  # fmt: skip
    """A draw from one row after its filters."""
    row = tl.program_id(0).to(tl.int64)
    at = x_ptr + row * x_row
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for first in range(0, width, BLOCK):
        x, _ = scaled(at, first, width, temperature, BLOCK)
        peaks = tl.maximum(peaks, x)
        broken |= (x != x).to(tl.int32)
    largest = tl.max(peaks, axis=0)
    top = ordered(largest)
    # Top-k: the largest bound that k tokens reach. Without it there is nothing to search.
    floor = ordered(tl.full([], float("-inf"), tl.float32))
    above = floor + 1
    if top_k > 0:
        above = top + 1
    while above - floor > 1:
        middle = (floor + above) >> 1
        enough = count_from(at, width, temperature, middle, BLOCK) >= tl.minimum(top_k, width)
        floor = tl.where(enough, middle, floor)
        above = tl.where(enough, above, middle)
    # Top-p: the lowest token that those above it leave short of p, and how many of its equals that holds for.
    border = floor
    equals = width
    if top_p < 1.0:
        wanted = top_p * mass_from(at, width, temperature, largest, floor, BLOCK)
        below = floor - 1
        border = top
        while border - below > 1:
            middle = (below + border) >> 1
            short = mass_from(at, width, temperature, largest, middle + 1, BLOCK) < wanted
            border = tl.where(short, middle, border)
            below = tl.where(short, below, middle)
        missing = wanted - mass_from(at, width, temperature, largest, border + 1, BLOCK)
        bits = border.to(tl.int32)
        level = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        count = tl.ceil(missing / tl.maximum(tl.exp(level - largest), 1e-38))
        equals = tl.maximum(tl.minimum(count, width * 1.0), 1.0).to(tl.int32)
    total = tl.full([], 0.0, tl.float64)
    seen = tl.full([], 0, tl.int32)
    for first in range(0, width, BLOCK):
        x, _ = scaled(at, first, width, temperature, BLOCK)
        weight, seen = kept_weights(x, largest, floor, border, equals, seen, min_p)
        total += tl.sum(weight, axis=0)
    threshold = tl.load(uniform_ptr + row) * total
    reached = tl.full([], 0.0, tl.float64)
    seen = tl.full([], 0, tl.int32)
    drawn = tl.full([], NOWHERE, tl.int32)
    last = tl.full([], 0, tl.int32)
    for first in range(0, width, BLOCK):
        x, column = scaled(at, first, width, temperature, BLOCK)
        weight, seen = kept_weights(x, largest, floor, border, equals, seen, min_p)
        some = weight > 0.0
        beyond = some & (reached + tl.cumsum(weight, axis=0) > threshold)
        drawn = tl.minimum(drawn, tl.min(tl.where(beyond, column, NOWHERE), axis=0))
        last = tl.maximum(last, tl.max(tl.where(some, column, 0), axis=0))
        reached += tl.sum(weight, axis=0)
    # Rounding may carry the threshold up to the total, which lies behind the last token.
    drawn = tl.where(drawn == NOWHERE, last, drawn)
    infinite = (largest == float("inf")) | (largest == float("-inf")) | (tl.max(broken, axis=0) > 0)
    tl.store(out_ptr + row, tl.where(infinite, -1, drawn).to(tl.int64))


def softmax(run: Runner, x: Tensor, temperature: float = 1.0) -> Tensor:
    """The softmax of x / temperature over the last dimension, in float32 inside, in the dtype of `x`."""
    flat = rows_of(x)
    rows, width = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(next_power_of_2(width), 4096)
    run(
        Launch(
            softmax_rows,
            {"x_ptr": flat, "out_ptr": out, "width": width, "x_row": flat.stride(0),
             "scale": 1.0 / temperature},
            {"BLOCK": block},
            tuple(Config.of(warps) for warps in ((8, 4, 16) if block >= 2048 else (4,))),
            lambda c: (rows,),
            lambda c: Work(8 * width, 3 * width * x.element_size()),
            static=frozenset(("width", "x_row")),
        )
    )  # fmt: skip
    return out


def sample_tokens(
    run: Runner, logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """See `graphwright.ops.sample_tokens`.

    The same token for the same number, up to two roundings: where a sum of probabilities meets `top_p` or `uniform` to
    six digits, and among equals at the border of top-p, of which the first ones stay here.

    Raises:
        BackendError: a negative temperature, or tensors on several devices.
    """
    if temperature < 0:
        raise BackendError(f"The temperature is {temperature}", fix="It must be 0 (greedy) or more")
    check_device(logits=logits, uniform=uniform)
    flat = rows_of(logits)
    return _most_likely(run, flat) if temperature == 0 else _drawn(run, flat, uniform, temperature, top_k, top_p, min_p)


def _most_likely(run: Runner, logits: Tensor) -> Tensor:
    rows, width = logits.shape
    span = min(SPAN, next_power_of_2(width))
    parts = cdiv(width, span)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    run(
        Launch(
            best_part,
            {"x_ptr": logits, "best_ptr": best, "index_ptr": index, "width": width, "x_row": _row_stride(logits),
             "parts": parts},
            {"SPAN": span},
            tuple(Config.of(warps, BLOCK=min(block, span)) for block, warps in ((1024, 4), (2048, 8), (512, 4))),
            lambda c: (rows, parts),
            lambda c: Work(3 * span, span * logits.element_size()),
            static=frozenset(("width", "x_row")),
        )
    )  # fmt: skip
    run(
        Launch(
            best_of_parts,
            {"best_ptr": best, "index_ptr": index, "out_ptr": out, "parts": parts},
            {"BLOCK_PARTS": next_power_of_2(parts)},
            (Config.of(1),),
            lambda c: (rows,),
            lambda c: Work(2 * parts, 8 * parts),
        )
    )
    return out


def _drawn(
    run: Runner, logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    # Two searches of at most 33 steps, and five passes besides.
    passes = 5 + 33 * ((top_k > 0) + (top_p < 1))
    room = next_power_of_2(width)
    run(
        Launch(
            draw_row,
            {"x_ptr": logits, "uniform_ptr": uniform.contiguous(), "out_ptr": out, "width": width,
             "x_row": _row_stride(logits), "temperature": float(temperature), "top_k": top_k, "top_p": float(top_p),
             "min_p": float(min_p)},
            {},
            tuple(Config.of(warps, BLOCK=min(block, room)) for block, warps in ((4096, 16), (2048, 8), (1024, 4))),
            lambda c: (rows,),
            lambda c: Work(12 * passes * width, width * logits.element_size()),
            static=frozenset(("width", "x_row")),
        )
    )  # fmt: skip
    return out


def _row_stride(logits: Tensor) -> int:
    """Distance of rows; that of a row alone may be any, and is never used."""
    return logits.stride(0) if logits.shape[0] > 1 else logits.shape[1]


def _shape(run: Runner, dtype: torch.dtype, temperature: float) -> Tensor:
    return sample_tokens(run, meta(dtype, 8, 128256), meta(torch.float64, 8), temperature, 50, 0.9, 0.05)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "softmax 128256": lambda run, dtype: softmax(run, meta(dtype, 8, 128256)),
    "greedy 128256": lambda run, dtype: _shape(run, dtype, 0.0),
    "draw 128256": lambda run, dtype: _shape(run, dtype, 0.7),
}
