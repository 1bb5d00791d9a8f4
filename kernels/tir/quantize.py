"""Activations to 8-bit codes: a step per token or group, and the sums of codes that zero points of a weight need."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Flat,
    Index,
    Kernel,
    Layout,
    T,
    floats,
    kernel,
    let,
    local,
    loop,
    parallel,
    product,
    reduce_max,
    spread,
    widest,
)  # fmt: skip
from graphwright.kernels.tir.functions import constant, integer, kind, rounded

LARGEST = 127.0
SMALLEST_STEP = 1.1754943508222875e-38
"""A row of zeros gets this step; any would do."""

Values = Callable[[Any, int], Any]
"""(place in a row, lanes) -> float32 values; computed anew each time, which is cheaper than scratch memory."""


@dataclass(frozen=True)
class CodeRow:
    """One row of codes as bytes: codes int8 [G * group_size], their sums per group int32 [G], steps float32 [1 or G].

    Attributes:
        width: activations in the row.
        group_size: activations that share a sum; those of the weight that reads them, or that share a step.
        grouped: every group has a step of its own, else the row has one.
    """

    width: int
    group_size: int
    grouped: bool = False

    @property
    def groups(self) -> int:
        """Groups, the last one padded."""
        return -(-self.width // self.group_size)

    @property
    def padded(self) -> int:
        """Codes, padding included."""
        return self.groups * self.group_size

    @property
    def sums(self) -> int:
        """Offset of the sums, in words of four bytes."""
        return -(-self.padded // 4)

    @property
    def step(self) -> int:
        """Offset of the first step, in words."""
        return self.sums + self.groups

    @property
    def steps(self) -> int:
        """Steps of a row."""
        return self.groups if self.grouped else 1

    @property
    def bytes(self) -> int:
        """Bytes of a row, a multiple of 64."""
        return -(-(self.step + self.steps) * 4 // 64) * 64


class CodeBuffers:
    """The rows of codes that a kernel reads or writes: [..., bytes of a row]."""

    def __init__(self, k: Kernel, lead: Sequence[Index], row: CodeRow) -> None:
        self.row, self._rows = row, product(lead)
        self.codes = k.write("codes", (*lead, row.bytes), "int8")

    def begin(self) -> None:
        """Makes the views; call it after `Kernel.begin`."""
        self.words = self.codes.view("int32", self._rows * (self.row.bytes // 4))
        self.pairs = self.codes.view("int64", self._rows * (self.row.bytes // 8))
        self.floats = self.codes.view("float32", self._rows * (self.row.bytes // 4))

    def quad(self, row: Any, number: Any) -> Any:
        """Four codes as one int32."""
        return self.words[row * (self.row.bytes // 4) + number]

    def eight(self, row: Any, number: Any) -> Any:
        """Eight codes as one int64."""
        return self.pairs[row * (self.row.bytes // 8) + number]

    def sum(self, row: Any, group: Any) -> Any:
        """The sum of a group's codes."""
        return self.words[row * (self.row.bytes // 4) + self.row.sums + group]

    def step(self, row: Any, group: Any = 0) -> Any:
        """The step of a row, or of a group of it."""
        return self.floats[row * (self.row.bytes // 4) + self.row.step + group]


def quantize(layout: Layout, described: CodeRow) -> tirx.PrimFunc:
    """The kernel that quantizes rows of a float32 tensor whose last dimension is contiguous."""
    with kernel("quantize") as k:
        x = k.read("x", layout.base, "float32")
        out = CodeBuffers(k, layout.shape[:-1], described)
        k.begin()
        out.begin()
        with parallel(layout.rows) as row:
            start = let(layout.row(row))
            quantize_row(lambda at, lanes: x.vec(start + at, lanes), out, row)
    return k.function


def dequantize_tokens(codes: Layout, scale: Layout) -> tirx.PrimFunc:
    """The kernel for int8 [..., D] with a scale [..., 1] each; writes a contiguous float32 tensor."""
    width = codes.shape[-1]
    with kernel("dequantize_tokens") as k:
        source, factor = k.read("codes", codes.base, "int8"), k.read("scale", scale.base, "float32")
        out = k.write("out", codes.shape, "float32")
        k.begin()
        lanes = widest(width)
        with parallel(codes.rows) as row:
            start, step = let(codes.row(row)), let(factor[scale.row(row)])
            with loop(width // lanes) as i:
                value = floats(source.vec(start + i * lanes, lanes), lanes) * spread(step, lanes)
                out.put(row * width + i * lanes, value, lanes)
    return k.function


def quantize_row(values: Values, out: CodeBuffers, row: Any) -> None:
    """Writes codes, sums and steps of one row."""
    shape = out.row
    lanes = widest(math.gcd(shape.width, shape.group_size))
    common = None if shape.grouped else _step(values, out, row, 0, 0, shape.width)
    whole, rest = divmod(shape.width, shape.group_size)

    def write(group: Any, width: int) -> None:
        step = common
        if step is None:
            step = _step(values, out, row, group, group * shape.group_size, width)
        _quantize_group(values, out, row, group, width // lanes, step, lanes)

    with loop(whole) as number:
        write(number, shape.group_size)
    if rest:
        write(whole, rest)
        for at in range(shape.width, shape.padded):
            out.codes.put(row * shape.bytes + at, tirx.const(0, "int8"), 1)


def _step(values: Values, out: CodeBuffers, row: Any, number: Any, first: Any, width: int) -> Any:
    """The step of `width` values from `first` on, stored as the row's step `number`."""
    largest = _largest(lambda at, lanes: values(first + at, lanes), width)
    step = let(T.max(largest / tirx.const(LARGEST, "float32"), tirx.const(SMALLEST_STEP, "float32")))
    out.floats.put(row * (out.row.bytes // 4) + out.row.step + number, step, 1)
    return step


def _quantize_group(values: Values, out: CodeBuffers, row: Any, group: Any, count: int, step: Any, lanes: int) -> None:
    total = local(lanes, "int32")
    total.put(0, integer(0, lanes), lanes)
    with loop(count) as i:
        at = let(group * out.row.group_size + i * lanes)
        code = _codes(values(at, lanes), step, lanes)
        out.codes.put(row * out.row.bytes + at, tirx.Cast(kind("int8", lanes), code), lanes)
        total.put(0, total.vec(0, lanes) + code, lanes)
    summed = total.vec(0, lanes)
    if lanes > 1:
        summed = tirx.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.add.v{lanes}i32", summed)
    out.words.put(row * (out.row.bytes // 4) + out.row.sums + group, summed, 1)


def round_codes(x: Flat, out: Flat, start: Any, width: int) -> Any:
    """Writes the codes of the first `width` values of `x` to `out` from `start` on; returns their step."""
    largest = _largest(x.vec, width)
    step = let(T.max(largest / tirx.const(LARGEST, "float32"), tirx.const(SMALLEST_STEP, "float32")))
    lanes = widest(width)
    with loop(width // lanes) as i:
        code = _codes(x.vec(i * lanes, lanes), step, lanes)
        out.put(start + i * lanes, tirx.Cast(kind("int8", lanes), code), lanes)
    return step


def _codes(value: Any, step: Any, lanes: int) -> Any:
    scaled = rounded(value / spread(step, lanes), lanes)
    limited = T.min(T.max(scaled, constant(-LARGEST, lanes)), constant(LARGEST, lanes))
    return let(tirx.Cast(kind("int32", lanes), limited))


def _largest(values: Values, width: int) -> Any:
    """Max |values|."""
    lanes = widest(width)
    best = local(lanes, "float32")
    best.put(0, constant(0.0, lanes), lanes)
    with loop(width // lanes) as i:
        value = let(values(i * lanes, lanes))
        best.put(0, T.max(best.vec(0, lanes), T.max(value, -value)), lanes)
    return let(reduce_max(best.vec(0, lanes), lanes))
