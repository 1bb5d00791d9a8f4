"""A small vocabulary over TVM's IR builder, so that kernels read like loops over registers.

    with kernel("scale_by_two") as k:
        x = k.read("x", (rows, 64), "float32")
        y = k.write("y", (rows, 64), "float32")
        k.begin()
        with parallel(rows) as m:
            y.put(m * 64, x.vec(m * 64, 16) * 2.0)
    function = k.function

Buffers are addressed by flat element offset: kernels are written for strided views of larger buffers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T  # noqa: N812  (the name that TVM's own code uses)

Index = Any
"""An integer: Python's or a TIR expression."""

LANES = 16
"""Rows of a weight tile, and floats in the widest vector; LLVM splits wider vectors than a machine has."""

CACHE_LINE = 64
"""Bytes."""

STACK = 1 << 15
"""Bytes of one scratch buffer that may lie on a thread's stack."""


class Flat:
    """A buffer as one run of elements."""

    def __init__(self, buffer: Any, dtype: str) -> None:
        self.buffer = buffer
        self.dtype = dtype

    def __getitem__(self, offset: Index) -> Any:
        """One element."""
        return self.buffer[offset]

    def vec(self, offset: Index, lanes: int = LANES) -> Any:
        """`lanes` consecutive elements as a vector."""
        return self.buffer[tirx.Ramp(offset, 1, lanes)] if lanes > 1 else self.buffer[offset]

    def put(self, offset: Index, value: Any, lanes: int = LANES) -> None:
        """Stores a vector of `lanes` elements, or one element."""
        T.buffer_store(self.buffer, value, [tirx.Ramp(offset, 1, lanes) if lanes > 1 else offset])

    def prefetch(self, offset: Index) -> None:
        """Asks for the cache line of an element, into the second cache; no harm where there is no such element."""
        address = tirx.address_of(self.buffer[offset])
        T.evaluate(tirx.call_llvm_intrin("", "llvm.prefetch", address, *(tirx.const(v, "int32") for v in (0, 2, 1))))

    def view(self, dtype: str, elements: Index) -> "Flat":
        """The same memory as `elements` elements of another dtype."""
        return Flat(T.decl_buffer((elements,), dtype, data=self.buffer.data), dtype)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a larger contiguous buffer.

    Attributes:
        base: shape of the buffer.
        shape: of the tensor.
        strides: elements between neighbours of each dimension; 0 for a broadcast one.
        offset: elements before the first.
    """

    base: tuple[Index, ...]
    shape: tuple[Index, ...]
    strides: tuple[Index, ...]
    offset: Index = 0

    @staticmethod
    def contiguous(shape: Sequence[Index]) -> "Layout":
        """A buffer of its own; a dimension of one element is broadcast to any number."""
        strides: list[Index] = []
        step: Index = 1
        for size in reversed(shape):
            strides.insert(0, 0 if isinstance(size, int) and size == 1 else step)
            step = step * size
        return Layout(tuple(shape), tuple(shape), tuple(strides))

    def at(self, *index: Index) -> Index:
        """Flat offset of an element; trailing indices may be left out."""
        place = self.offset
        for position, stride in zip(index, self.strides, strict=False):
            place = place + position * stride
        return place

    def row(self, number: Index) -> Index:
        """Flat offset of the `number`-th run along the last dimension."""
        place = self.offset
        for size, stride in zip(reversed(self.shape[1:-1]), reversed(self.strides[1:-1]), strict=True):
            place = place + (number % size) * stride
            number = number // size
        return place + number * self.strides[0] if len(self.shape) > 1 else place

    @property
    def rows(self) -> Index:
        """Number of runs along the last dimension."""
        return product(self.shape[:-1])


class Kernel:
    """A kernel being built; `function` holds it once the block has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.function: tirx.PrimFunc | None = None
        self._arguments: list[tuple[Flat, Index]] = []

    def read(self, name: str, shape: Sequence[Index], dtype: str) -> Flat:
        """The next argument."""
        buffer = T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype, align=1)
        flat = Flat(buffer, dtype)
        self._arguments.append((flat, product(shape)))
        return flat

    write = read

    def begin(self) -> None:
        """Ends the arguments; from here on they are flat."""
        for flat, elements in self._arguments:
            flat.buffer = T.decl_buffer((elements,), flat.dtype, data=flat.buffer.data)


@contextmanager
def kernel(name: str) -> Iterator[Kernel]:
    """Builds one kernel from what the block emits."""
    made = Kernel(name)
    with IRBuilder() as builder, T.prim_func(is_private=False):
        T.func_name(name)
        # Caches are read and written through one argument each, so no two arguments alias.
        T.func_attr({"tirx.noalias": True})
        yield made
    made.function = builder.get()


def local(elements: int, dtype: str) -> Flat:
    """Scratch memory: on the stack, and in registers where its offsets are constants, unless it is large."""
    width = int("".join(c for c in dtype if c.isdigit())) // 8
    lanes = CACHE_LINE // width
    if elements % lanes:
        return Flat(_scratch(elements, dtype, elements * width), dtype)
    # LLVM aligns scalars on the stack to 16 bytes; vectors that cross cache lines take several times as long.
    lines = elements // lanes
    memory = _scratch(lines, f"{dtype}x{lanes}", lines * CACHE_LINE)
    return Flat(T.decl_buffer((elements,), dtype, data=memory.data, scope="local"), dtype)


def _scratch(elements: int, dtype: str, bytes_: int) -> Any:
    annotations = {"disable_lower_builtin": True} if bytes_ <= STACK else {}
    return T.alloc_buffer((elements,), dtype, scope="local", annotations=annotations)


def parallel(extent: Index) -> Any:
    """A loop whose iterations threads share; a plain loop when there is but one."""
    return T.serial(0, extent) if isinstance(extent, int) and extent == 1 else T.parallel(0, extent)


def loop(extent: Index) -> Any:
    """A loop of one thread."""
    return T.serial(0, extent)


def let(value: Any) -> Any:
    """Computes a value once and names it.

    Floats and vectors go through memory, which LLVM takes back into registers: TVM tries to simplify whatever it sees a
    name bound to, again for every use, and takes ten times as long as LLVM does with masks and online softmaxes.
    """
    dtype = str(value.ty.dtype) if isinstance(value, tirx.Expr) else "int64"
    if dtype in ("int32", "int64", "bool"):
        return T.Bind(value)
    held = Flat(_scratch(1, dtype, 0), dtype)
    held.put(0, value, 1)
    return held[0]


def splat(value: Any, lanes: int = LANES) -> Any:
    """One value in every lane."""
    return tirx.Broadcast(value, lanes)


def spread(value: Any, lanes: int) -> Any:
    """One value in every lane; itself where there is one lane."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def zeros(dtype: str, lanes: int = LANES) -> Any:
    """A vector of zeros."""
    return tirx.Broadcast(tirx.const(0, dtype), lanes)


def floats(vector: Any, lanes: int = LANES) -> Any:
    """A vector converted to float32."""
    return tirx.Cast(f"float32x{lanes}" if lanes > 1 else "float32", vector)


def product(sizes: Sequence[Index]) -> Index:
    """The product of sizes."""
    total: Index = 1
    for size in sizes:
        total = total * size
    return total


def widest(size: int) -> int:
    """The most lanes, a power of two up to 16, that divide a size."""
    return next(lanes for lanes in (16, 8, 4, 2, 1) if size % lanes == 0)


def ceil_div(value: Index, by: int) -> Index:
    """Value / by, rounded up."""
    return (value + by - 1) // by


def minimum(left: Any, right: Any) -> Any:
    """The smaller of two values."""
    return min(left, right) if isinstance(left, int) and isinstance(right, int) else T.min(left, right)


def reduce_add(vector: Any, lanes: int = LANES) -> Any:
    """The sum of a vector's lanes, pairwise: LLVM's own reduction adds floats one after the other."""
    return _reduce(vector, lanes, lambda left, right: left + right)


def reduce_max(vector: Any, lanes: int = LANES) -> Any:
    """The largest of a vector's lanes."""
    return _reduce(vector, lanes, T.max)


def _reduce(vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    while lanes > 1:
        vector, lanes = let(vector), lanes // 2
        low = tirx.Shuffle([vector], list(range(lanes)))
        high = tirx.Shuffle([vector], list(range(lanes, 2 * lanes)))
        vector = combine(low, high)
    return vector
