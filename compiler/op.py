"""One op, one definition: schema, eager reference, shape function, cost and samples stand together.

    @op
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ...                                  # the body is the reference; the schema comes from the signature

    @rms_norm.cost
    def _(x, weight, eps): return Cost(flops=5 * x.numel)

    @rms_norm.samples
    def _(dtype): yield Sample(torch.randn(2, 3, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-6)

Each op is a `torch.library` custom op in the namespace `graphwright`, so a program made of them runs anywhere.
The reference also serves as the shape function, on fake tensors, unless `@name.fake` gives another. Backends add
a lowering beside an op in their own folder; they never change it here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

NAMESPACE = "graphwright"

OPS: dict[str, "Op"] = {}
"""Every semantic op by name, filled as the modules of `graphwright.ops` are imported."""


@dataclass(frozen=True)
class TensorInfo:
    """What a cost function sees of a tensor: symbolic shape and bits per element."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> sympy.Expr:
        """Number of elements."""
        return sympy.Mul(*self.shape)

    @property
    def bytes(self) -> sympy.Expr:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """Work of one node. `bytes` None means: every input read once and the output written once."""

    flops: sympy.Expr | int = 0
    bytes: sympy.Expr | int | None = None


@dataclass(frozen=True)
class Sample:
    """Arguments to try an op with, and what they are there to reveal."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Op:
    """A semantic op. Calling it calls the registered custom op, also while a graph is traced."""

    def __init__(self, reference: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self._custom = torch.library.custom_op(f"{NAMESPACE}::{self.name}", reference, mutates_args=mutates)
        self._custom.register_fake(reference)
        self.cost_of: Callable[..., Cost] = lambda *_args, **_kwargs: Cost()
        self.samples_of: Callable[[torch.dtype], Iterable[Sample]] = lambda _dtype: ()
        self.__doc__ = reference.__doc__

    @property
    def target(self) -> torch._ops.OpOverload:
        """The overload that appears in graphs."""
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the op."""
        return self.target(*args, **kwargs)

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Gives the op its own shape function, where the reference cannot run on fake tensors."""
        self._custom.register_fake(function)
        return function

    def cost(self, function: Callable[..., Cost]) -> Callable[..., Cost]:
        """Gives the op its cost. Tensors arrive as `TensorInfo`, everything else as it is."""
        self.cost_of = function
        return function

    def samples(self, function: Callable[[torch.dtype], Iterator[Sample]]) -> Callable[[torch.dtype], Iterator[Sample]]:
        """Gives the op sample arguments per floating-point dtype; tests and backends draw from them."""
        self.samples_of = function
        return function


def op(reference: Callable[..., Any] | None = None, *, mutates: tuple[str, ...] = ()) -> Any:
    """Registers `reference` as a semantic op; `mutates` names the arguments it writes in place."""
    if reference is None:
        return lambda function: op(function, mutates=mutates)
    made = Op(reference, mutates)
    OPS[made.name] = made
    return made


def op_of(target: Any) -> Op | None:
    """The semantic op that a graph node's target calls, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return OPS.get(target._opname)
    return None
