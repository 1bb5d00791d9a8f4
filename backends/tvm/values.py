"""What the translation knows of a tensor: a Relax variable, and where in it the tensor lies.

Shapes are sympy expressions of the program's symbols. Slices, reshapes and transpositions of a tensor are views: they
change the layout and move nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod
from tvm import relax, tirx

from graphwright.errors import BackendError
from graphwright.kernels.tir.emit import Layout

Size = Any
"""An int or a sympy expression."""


@dataclass(frozen=True)
class View:
    """A tensor."""

    variable: relax.Expr
    layout: Layout
    dtype: str

    @property
    def dense(self) -> bool:
        """It is all of its variable, in order."""
        expected = Layout.contiguous(self.layout.shape)
        return self.layout.strides == expected.strides and self.layout.base == self.layout.shape


class Sizes:
    """Sympy expressions as TIR expressions of one function's own variables."""

    def __init__(self) -> None:
        self._variables: dict[str, tirx.Var] = {}

    def __call__(self, size: Size) -> Any:
        """An int, or a TIR expression."""
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size.is_Symbol or str(size) in self._variables:
            return self._variables.setdefault(str(size), tirx.Var(str(size), "int64"))
        parts = [self(part) for part in size.args]
        if isinstance(size, (sympy.Add, sympy.Mul)):
            total = parts[0]
            for part in parts[1:]:
                total = total + part if isinstance(size, sympy.Add) else total * part
            return total
        if isinstance(size, FloorDiv):
            return tirx.floordiv(parts[0], parts[1])
        if isinstance(size, Mod):
            return tirx.floormod(parts[0], parts[1])
        raise BackendError(f"The TVM backend cannot compute the size {size}", fix="Use backend='inductor'")

    def dim(self, size: Size) -> Any:
        """The size of a buffer's dimension; a compound one becomes a variable, which the buffer then defines."""
        if not isinstance(size, int) and not size.is_Integer:
            self._variables.setdefault(str(size), tirx.Var(f"size_{len(self._variables)}", "int64"))
        return self(size)

    def layout(self, layout: Layout) -> Layout:
        """A layout whose sizes are TIR expressions."""

        def each(sizes: Sequence[Size]) -> tuple[Any, ...]:
            return tuple(self(size) for size in sizes)

        base = tuple(self.dim(size) for size in layout.base)
        return Layout(base, each(layout.shape), each(layout.strides), self(layout.offset))


def shape_of(value: Any, fixed: Mapping[str, int]) -> tuple[Size, ...]:
    """Sizes of a fake tensor, with the fixed symbols put in."""
    return tuple(size_of(size, fixed) for size in value.shape)


def size_of(value: Any, fixed: Mapping[str, int]) -> Size:
    """A symbolic integer as an int or a sympy expression."""
    if not isinstance(value, torch.SymInt):
        return value
    known = {symbol: fixed[str(symbol)] for symbol in value.node.expr.free_symbols if str(symbol) in fixed}
    expression = value.node.expr.subs(known)
    return int(expression) if expression.is_Integer else expression


def transpose(layout: Layout, order: Sequence[int]) -> Layout:
    """Dimensions in another order."""
    shape, strides = (tuple(part[i] for i in order) for part in (layout.shape, layout.strides))
    return Layout(layout.base, shape, strides, layout.offset)


def narrow(layout: Layout, dim: int, start: Size, length: Size, step: int = 1) -> Layout:
    """Every `step`-th place of part of a dimension, `length` in all."""
    shape = (*layout.shape[:dim], length, *layout.shape[dim + 1 :])
    strides = (*layout.strides[:dim], layout.strides[dim] * step, *layout.strides[dim + 1 :])
    return Layout(layout.base, shape, strides, layout.offset + start * layout.strides[dim])


def insert(layout: Layout, dim: int) -> Layout:
    """A dimension of one element more."""
    shape = (*layout.shape[:dim], 1, *layout.shape[dim:])
    return Layout(layout.base, shape, (*layout.strides[:dim], 0, *layout.strides[dim:]), layout.offset)


def expand(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """Dimensions of one element repeated, and new ones in front; None where that is not all that changes."""
    missing = len(shape) - len(layout.shape)
    old, strides = (1,) * missing + layout.shape, (0,) * missing + layout.strides
    if any(before not in (after, 1) for before, after in zip(old, shape, strict=True)):
        return None
    steps = tuple(
        0 if before == 1 and after != 1 else stride for before, after, stride in zip(old, shape, strides, strict=True)
    )
    return Layout(layout.base, tuple(shape), steps, layout.offset)


def reshape(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """Another shape over the same elements, or None where that needs a copy."""
    strides: list[Size] = []
    source = [(size, stride) for size, stride in zip(layout.shape, layout.strides, strict=True) if size != 1]
    place = 0
    wanted = list(shape)
    taken: Size = 1
    group: list[tuple[Size, Size]] = []
    for size in wanted:
        if size == 1:
            strides.append(0)
            continue
        if not group:
            if place == len(source):
                return None
            group, taken = [source[place]], 1
            place += 1
        taken = taken * size
        # Dimensions of the source join as long as they lie one behind the other.
        while not _equal(_total(group), taken) and not _divides(taken, _total(group)):
            if place == len(source) or not _equal(group[-1][1], source[place][1] * source[place][0]):
                return None
            group.append(source[place])
            place += 1
        strides.append(sympy.cancel(_total(group) / taken) * group[-1][1])
        if _equal(_total(group), taken):
            group = []
    if group or place != len(source):
        return None
    return Layout(layout.base, tuple(shape), tuple(_plain(s) for s in strides), layout.offset)


def _total(group: Sequence[tuple[Size, Size]]) -> Size:
    total: Size = sympy.Integer(1)
    for size, _ in group:
        total = total * size
    return total


def _equal(left: Size, right: Size) -> bool:
    return sympy.expand(left - right) == 0


def _divides(part: Size, whole: Size) -> bool:
    ratio = sympy.cancel(sympy.sympify(whole) / part)
    return bool(ratio.is_Integer or (ratio.is_polynomial() and sympy.denom(ratio) == 1)) and ratio != 1


def _plain(size: Size) -> Size:
    return int(size) if isinstance(size, int) or size.is_Integer else size
