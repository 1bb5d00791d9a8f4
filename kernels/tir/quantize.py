"""Activations to 8-bit codes: a scale per token, and the sums of codes that zero points of a weight need."""

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Flat,
    Kernel,
    Layout,
    T,
    kernel,
    let,
    local,
    loop,
    parallel,
    reduce_max,
    splat,
    widest,
    zeros,
)  # fmt: skip
from graphwright.kernels.tir.functions import constant, rounded

LARGEST = 127.0
SMALLEST_STEP = 1.1754943508222875e-38
"""A row of zeros gets this step; any would do."""


class CodeBuffers:
    """Where a quantized row goes: codes int8 [..., K padded], sums int32 [..., G], step float32 [..., 1]."""

    def __init__(self, k: Kernel, lead: Sequence[Any], width: int, group_size: int) -> None:
        self.width, self.group_size = width, group_size
        self.groups = -(-width // group_size)
        self.padded = self.groups * group_size
        self.codes = k.write("codes", (*lead, self.padded), "int8")
        self.sums = k.write("sums", (*lead, self.groups), "int32")
        self.step = k.write("step", (*lead, 1), "float32")


def quantize(layout: Layout, group_size: int) -> tirx.PrimFunc:
    """The kernel that quantizes rows of a float32 tensor whose last dimension is contiguous."""
    width = layout.shape[-1]
    with kernel("quantize") as k:
        x = k.read("x", layout.base, "float32")
        out = CodeBuffers(k, layout.shape[:-1], width, group_size)
        k.begin()
        with parallel(layout.rows) as row:
            values = row_buffer(out)
            start = let(layout.row(row))
            copy_row(values, lambda at, lanes: x.vec(start + at, lanes), width)
            quantize_row(values, out, row)
    return k.function


def row_buffer(out: CodeBuffers) -> Flat:
    """Scratch for one row, zero beyond its width."""
    values = local(out.padded, "float32")
    for at in range(out.width, out.padded):
        values.put(at, tirx.const(0.0, "float32"), 1)
    return values


def copy_row(values: Flat, load: Any, width: int) -> None:
    """values[i] = load(i, lanes) for a row of `width` elements, in vectors and then one by one."""
    whole = width // 16
    with loop(whole) as i:
        values.put(i * 16, load(i * 16, 16), 16)
    for at in range(whole * 16, width):
        values.put(at, load(at, 1), 1)


def quantize_row(values: Flat, out: CodeBuffers, row: Any) -> None:
    """Codes, sums and step of one row that lies in scratch."""
    step = let(
        T.max(_largest(values, out.padded) / tirx.const(LARGEST, "float32"), tirx.const(SMALLEST_STEP, "float32"))
    )
    out.step.put(row, step, 1)
    lanes = widest(out.group_size)
    count = out.group_size // lanes
    with loop(out.groups) as group:
        total = local(lanes, "int32")
        total.put(0, zeros("int32", lanes) if lanes > 1 else tirx.const(0, "int32"), lanes)
        with loop(count) as i:
            at = let(group * out.group_size + i * lanes)
            code = _codes(values, at, step, lanes)
            out.codes.put(row * out.padded + at, tirx.Cast(f"int8x{lanes}", code), lanes)
            total.put(0, total.vec(0, lanes) + code, lanes)
        name = f"llvm.vector.reduce.add.v{lanes}i32"
        out.sums.put(row * out.groups + group, tirx.call_llvm_pure_intrin("int32", name, total.vec(0, lanes)), 1)


def _codes(values: Flat, at: Any, step: Any, lanes: int) -> Any:
    scaled = rounded(values.vec(at, lanes) / splat(step, lanes), lanes)
    limited = T.min(T.max(scaled, constant(-LARGEST, lanes)), constant(LARGEST, lanes))
    return let(tirx.Cast(f"int32x{lanes}", limited))


def _largest(values: Flat, width: int) -> Any:
    """Max |values|."""
    lanes = widest(width)
    best = local(lanes, "float32")
    best.put(0, constant(0.0, lanes), lanes)
    with loop(width // lanes) as i:
        value = let(values.vec(i * lanes, lanes))
        best.put(0, T.max(best.vec(0, lanes), T.max(value, -value)), lanes)
    return let(reduce_max(best.vec(0, lanes), lanes))
