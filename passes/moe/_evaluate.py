"""Learning what a part of a graph means by evaluating it on random numbers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.errors import PassError
from graphwright.program import Program
from graphwright.rewrite import run_nodes

aten = torch.ops.aten


class UnknownError(Exception):
    """Why a subgraph is not understood."""


def evaluate(program: Program, ends: list[fx.Node], bound: dict[fx.Node, Any]) -> list[Any]:
    """Values of `ends`, given those of some nodes.

    Raises:
        UnknownError: an end depends on something else than the bound nodes and constants.
    """
    try:
        return run_nodes(program, ends, bound)
    except PassError as error:
        raise UnknownError(error.problem) from error


def between(end: fx.Node, stops: set[fx.Node]) -> Iterator[fx.Node]:
    """Everything that `end` is computed from, itself included, up to the stops."""
    seen, stack = set(stops), [end]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(node.all_input_nodes)


def constants(end: fx.Node, stops: set[fx.Node]) -> set[float]:
    """Positive constants that calls between two nodes take."""
    calls = [n for n in between(end, stops) if n.op == "call_function" and n.target is not aten.slice.Tensor]
    found = (a for node in calls for a in (*node.args, *node.kwargs.values()))
    return {float(a) for a in found if type(a) in (int, float) and 0 < a < math.inf}


class Sizes:
    """Numbers for the symbols in a shape: `shape` is what it is then, and `tokens` the product of all but the last.

    The last symbol gets the number `least`, and those before it `few`, or numbers near `least` where `few` is 0.
    """

    def __init__(self, shape: Sequence[Any], least: int = 5, few: int = 0) -> None:
        sizes = [size.node.expr.free_symbols for size in shape if isinstance(size, torch.SymInt)]
        free = list(dict.fromkeys(symbol for symbols in sizes for symbol in sorted(symbols, key=str)))
        self.symbols = {symbol: few or least + 2 * (place + 1) for place, symbol in enumerate(free[:-1])}
        self.symbols |= dict.fromkeys(free[-1:], least)
        self.shape = tuple(self.of(size) for size in shape)

    @property
    def tokens(self) -> int:
        """Rows of the last dimension."""
        return math.prod(self.shape[:-1])

    def of(self, size: Any) -> int:
        """One size."""
        return int(size.node.expr.subs(self.symbols)) if isinstance(size, torch.SymInt) else int(size)

    def bind(self, end: fx.Node, bound: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """`bound` with the values of all size nodes behind `end`."""
        values = dict(bound)
        for node in between(end, set(bound)):
            size = node.meta.get("val")
            if isinstance(size, torch.SymInt):
                values[node] = self.of(size)
        return values
