"""Softmax over a vocabulary, and drawing from it without storing it.

Gumbel-max (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the index with the largest logit / temperature plus
Gumbel noise is a draw from the softmax. Noise comes from the counter-based generator Philox (Salmon et al. 2011), so a
draw depends on the seed, the row and the token alone, not on how the vocabulary is cut among blocks.
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
"""Tokens of the vocabulary that one block looks through."""


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
def draw_part(
    x_ptr, best_ptr, index_ptr, width, x_row, scale, parts, seed,
    GREEDY: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best token of one span of one row, and how good it is."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for first in range(part * SPAN, (part + 1) * SPAN, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
        if not GREEDY:
            uniform = tl.rand(seed, (row * width + column).to(tl.int32))
            # `rand` may return 0, whose double logarithm is -inf on both sides of what can be drawn.
            x = x * scale - tl.log(-tl.log(tl.maximum(uniform, 1e-10)) + 1e-10)
            x = tl.where(column < width, x, float("-inf"))
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, column, where)
    peak = tl.max(best, axis=0)
    # The first of equals, as argmax has it.
    index = tl.min(tl.where(best == peak, where, 2147483647), axis=0)
    tl.store(best_ptr + row * parts + part, peak)
    tl.store(index_ptr + row * parts + part, index)


@triton.jit
def draw_best(best_ptr, index_ptr, out_ptr, parts, BLOCK_PARTS: tl.constexpr):
    """The best of a row's spans."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    best = tl.load(best_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    index = tl.load(index_ptr + row * parts + part, mask=part < parts, other=2147483647)
    peak = tl.max(best, axis=0)
    tl.store(out_ptr + row, tl.min(tl.where(best == peak, index, 2147483647), axis=0).to(tl.int64))


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


def sample(run: Runner, logits: Tensor, temperature: float, seed: int) -> Tensor:
    """A token int64 [B] for every row of logits [B, V]: the largest at temperature 0, else a draw.

    Raises:
        BackendError: a negative temperature.
    """
    if temperature < 0:
        raise BackendError(f"The temperature is {temperature}", fix="It must be 0 (greedy) or more")
    check_device(logits=logits)
    flat = rows_of(logits)
    rows, width = flat.shape
    span = min(SPAN, next_power_of_2(width))
    parts = cdiv(width, span)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    greedy = temperature == 0
    run(
        Launch(
            draw_part,
            {"x_ptr": flat, "best_ptr": best, "index_ptr": index, "width": width, "x_row": flat.stride(0),
             "scale": 0.0 if greedy else 1.0 / temperature, "parts": parts, "seed": seed},
            {"GREEDY": greedy, "SPAN": span},
            tuple(Config.of(warps, BLOCK=min(block, span)) for block, warps in ((1024, 4), (2048, 8), (512, 4))),
            lambda c: (rows, parts),
            lambda c: Work((2 if greedy else 60) * span, span * logits.element_size()),
            static=frozenset(("width", "x_row")),
        )
    )  # fmt: skip
    run(
        Launch(
            draw_best,
            {"best_ptr": best, "index_ptr": index, "out_ptr": out, "parts": parts},
            {"BLOCK_PARTS": next_power_of_2(parts)},
            (Config.of(1),),
            lambda c: (rows,),
            lambda c: Work(2 * parts, 8 * parts),
        )
    )
    return out


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "softmax 128256": lambda run, dtype: softmax(run, meta(dtype, 8, 128256)),
    "greedy 128256": lambda run, dtype: sample(run, meta(dtype, 8, 128256), 0.0, 0),
    "draw 128256": lambda run, dtype: sample(run, meta(dtype, 8, 128256), 0.7, 0),
}
