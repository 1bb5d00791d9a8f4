"""Activations to 8-bit codes: a scale per token, and the sums of codes that zero points of a weight need."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Index,
    Kernel,
    Layout,
    T,
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
    """One row of codes as bytes: codes int8 [G * group_size], their sums per group int32 [G], the step float32.

    Attributes:
        width: activations in the row.
        group_size: of the weight that reads them.
    """

    width: int
    group_size: int

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
        """Offset of the step, in words."""
        return self.sums + self.groups

    @property
    def bytes(self) -> int:
        """Bytes of a row, a multiple of 64."""
        return -(-(self.step + 1) * 4 // 64) * 64


class CodeBuffers:
    """The rows of codes that a kernel reads or writes: [..., bytes of a row]."""

    def __init__(self, k: Kernel, lead: Sequence[Index], row: CodeRow) -> None:
        self.row, self._rows = row, product(lead)
        self.codes = k.write("codes", (*lead, row.bytes), "int8")

    def begin(self) -> None:
        """Makes the views; call it after `Kernel.begin`."""
        self.words = self.codes.view("int32", self._rows * (self.row.bytes // 4))
        self.floats = self.codes.view("float32", self._rows * (self.row.bytes // 4))

    def quad(self, row: Any, number: Any) -> Any:
        """Four codes as one int32."""
        return self.words[row * (self.row.bytes // 4) + number]

    def sum(self, row: Any, group: Any) -> Any:
        """The sum of a group's codes."""
        return self.words[row * (self.row.bytes // 4) + self.row.sums + group]

    def step(self, row: Any) -> Any:
        """The step of a row."""
        return self.floats[row * (self.row.bytes // 4) + self.row.step]


def quantize(layout: Layout, group_size: int) -> tirx.PrimFunc:
    """The kernel that quantizes rows of a float32 tensor whose last dimension is contiguous."""
    with kernel("quantize") as k:
        x = k.read("x", layout.base, "float32")
        out = CodeBuffers(k, layout.shape[:-1], CodeRow(layout.shape[-1], group_size))
        k.begin()
        out.begin()
        with parallel(layout.rows) as row:
            start = let(layout.row(row))
            quantize_row(lambda at, lanes: x.vec(start + at, lanes), out, row)
    return k.function


def quantize_row(values: Values, out: CodeBuffers, row: Any) -> None:
    """Writes codes, sums and step of one row."""
    shape = out.row
    lanes = widest(math.gcd(shape.width, shape.group_size))
    largest = let(_largest(values, shape.width) / tirx.const(LARGEST, "float32"))
    step = let(T.max(largest, tirx.const(SMALLEST_STEP, "float32")))
    words = let(row * (shape.bytes // 4))
    out.floats.put(words + shape.step, step, 1)
    whole = shape.width // shape.group_size
    with loop(whole) as group:
        _quantize_group(values, out, row, words, group, shape.group_size // lanes, step, lanes)
    if whole < shape.groups:
        rest = shape.width - whole * shape.group_size
        _quantize_group(values, out, row, words, whole, rest // lanes, step, lanes)
        for at in range(shape.width, shape.padded):
            out.codes.put(row * shape.bytes + at, tirx.const(0, "int8"), 1)


def _quantize_group(
    values: Values, out: CodeBuffers, row: Any, words: Any, group: Any, count: int, step: Any, lanes: int
) -> None:
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
    out.words.put(words + out.row.sums + group, summed, 1)


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
