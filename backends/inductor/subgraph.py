"""Regions as graphs of their own: everything they read is an input, so that one library serves all repetitions.

Sizes are never inputs. A region computes the ones it needs from the shapes of its tensors; where no input has a
symbolic dimension that an argument mentions, an input of the program that has it comes along to carry it.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv, Mod

from graphwright.errors import BackendError
from graphwright.ops import quantized_linear
from graphwright.program import Program
from graphwright.rewrite import describe

aten = torch.ops.aten

SourceKind = Literal["input", "weight", "value"]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: an input or state of the program, a weight, or a value that a call made."""

    kind: SourceKind
    name: str


@dataclass(frozen=True)
class Region:
    """A graph whose placeholders are all it reads, the tensors to trace it with, and the ones that are state.

    Attributes:
        name: `prologue`, `body`, `epilogue` or `whole`.
        graph: the nodes, with `meta["few"]` on linear layers over few rows and `meta["state"]` on state.
        values: one fake tensor per input, with the program's symbolic sizes.
    """

    name: str
    graph: fx.Graph
    values: tuple[Tensor, ...]


def source_of(program: Program, node: fx.Node) -> Source:
    """Where the value of `node` is found between regions."""
    if node.op == "placeholder":
        return Source("input", str(node.target))
    if node.op == "get_attr":
        return Source("weight", str(node.target))
    return Source("value", node.name)


def make_region(
    program: Program, name: str, repetitions: Sequence[Sequence[fx.Node]]
) -> tuple[Region, list[tuple[Source, ...]], list[tuple[str, ...]]]:
    """The region of some isomorphic pieces of the graph, and the sources and output names of each piece.

    Raises:
        BackendError: a value that is no tensor crosses the region's edge, or a size cannot be computed in it.
    """
    columns: dict[tuple[fx.Node, ...], int] = {}
    slots: list[int | None] = []
    inside = [set(piece) for piece in repetitions]
    for calls in zip(*repetitions, strict=True):
        for sources in zip(*(tensor_arguments(call) for call in calls), strict=True):
            outside = sources[0] not in inside[0]
            slots.append(columns.setdefault(sources, len(columns)) if outside else None)
    for carrier in _carriers(program, repetitions[0], list(columns)):
        columns.setdefault((carrier,) * len(repetitions), len(columns))
    made = _outputs(repetitions, inside)
    _refuse_others([column[0] for column in columns], [repetitions[0][index] for index in made])
    graph = _build(program, repetitions[0], list(columns), slots, made)
    values = tuple(column[-1].meta["val"] for column in columns)
    sources_of = [tuple(source_of(program, c[i]) for c in columns) for i in range(len(repetitions))]
    return Region(name, graph, values), sources_of, [tuple(p[index].name for index in made) for p in repetitions]


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number computed from sizes; regions compute those anew from their inputs."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def tensor_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments of a call that are not sizes, in order, repeated where they are repeated."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, dict(node.kwargs)), found.append)
    return (n for n in found if not is_size(n))


def _outputs(repetitions: Sequence[Sequence[fx.Node]], inside: Sequence[set[fx.Node]]) -> list[int]:
    """Places in a piece whose value is read outside of it, by any piece."""
    return [
        index
        for index in range(len(repetitions[0]))
        if any(
            user not in inside[number] and not isinstance(user.meta.get("val"), (int, torch.SymInt))
            for number, piece in enumerate(repetitions)
            for user in piece[index].users
        )
    ]


def _refuse_others(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
    for node in (*inputs, *outputs):
        if not isinstance(node.meta.get("val"), Tensor):
            raise BackendError("A list of tensors is used in more than one region", where=describe(node))


def _carriers(program: Program, nodes: Sequence[fx.Node], columns: Sequence[tuple[fx.Node, ...]]) -> list[fx.Node]:
    """Inputs of the program that have the symbols which arguments mention and no other input has."""
    wanted: set[sympy.Symbol] = set()
    for expression in _sizes(nodes):
        wanted |= expression.free_symbols
    for column in columns:
        for size in _expressions(column[-1].meta["val"]):
            wanted |= size.free_symbols
    held = {size for column in columns for size in _expressions(column[-1].meta["val"]) if size.is_Symbol}
    found = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and wanted - held:
            bare = {size for size in _expressions(node.meta["val"]) if size.is_Symbol}
            if bare & (wanted - held):
                found.append(node)
                held |= bare
    return found


def _sizes(nodes: Sequence[fx.Node]) -> Iterator[sympy.Expr]:
    for node in nodes:
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if isinstance(value, torch.SymInt):
                yield value.node.expr


def _expressions(value: Any) -> list[sympy.Expr]:
    sizes = value.shape if isinstance(value, Tensor) else ()
    return [s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in sizes]


def _build(
    program: Program,
    nodes: Sequence[fx.Node],
    columns: Sequence[tuple[fx.Node, ...]],
    slots: Sequence[int | None],
    made: Sequence[int],
) -> fx.Graph:
    graph = fx.Graph()
    state = {spec.name for spec in program.contract.state}
    placeholders = []
    for number, column in enumerate(columns):
        placeholder = graph.placeholder(f"input_{number}")
        placeholder.meta["state"] = column[0].op == "placeholder" and str(column[0].target) in state
        placeholders.append(placeholder)
    sizes = _SizeBuilder(graph, placeholders, [column[-1].meta["val"] for column in columns])
    few = _few_rows(program)
    copies: dict[fx.Node, fx.Node] = {}
    remaining = iter(slots)

    def argument(source: fx.Node) -> Any:
        if not isinstance(source.meta.get("val"), (Tensor, list, tuple)):
            return sizes.build(source)
        slot = next(remaining)
        return copies[source] if slot is None else placeholders[slot]

    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), argument)
        copies[node] = graph.call_function(node.target, args, kwargs)
        copies[node].meta = {"few": node in few, "where": describe(node)}
    graph.output(tuple(copies[nodes[index]] for index in made))
    return graph


class _SizeBuilder:
    """Numbers computed from the shapes of a region's inputs."""

    def __init__(self, graph: fx.Graph, placeholders: Sequence[fx.Node], values: Sequence[Any]) -> None:
        self._graph = graph
        self._known: dict[sympy.Expr, Any] = {}
        self._axes: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        for placeholder, value in zip(placeholders, values, strict=True):
            for axis, expression in enumerate(_expressions(value)):
                if expression.is_Symbol:
                    self._axes.setdefault(expression, (placeholder, axis))

    def build(self, node: fx.Node) -> Any:
        """The number that `node` stands for."""
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            if isinstance(value, (int, float)):
                return value
            raise BackendError("A symbolic number that is no integer is an argument", where=describe(node))
        made = self._of(value.node.expr)
        if made is None:
            raise BackendError(f"The size {value} cannot be computed from a region's inputs", where=describe(node))
        return made

    def _of(self, expression: sympy.Expr) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression not in self._known:
            self._known[expression] = self._make(expression)
        return self._known[expression]

    def _make(self, expression: sympy.Expr) -> Any:
        if expression in self._axes:
            return self._graph.call_function(aten.sym_size.int, self._axes[expression])
        functions = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv, Mod: operator.mod}
        function = functions.get(expression.func)
        parts = [self._of(part) for part in expression.args]
        if function is None or any(part is None for part in parts):
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self._graph.call_function(function, (total, part))
        return total


def _few_rows(program: Program) -> set[fx.Node]:
    """Linear layers over chosen positions: few rows, however long the sequence is."""
    by_name = {str(n.target): n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    chosen: set[Any] = set()
    long: set[Any] = set()
    for spec in program.contract.inputs:
        symbols = {size for size in _expressions(by_name[spec.name]) if size.is_Symbol}
        (chosen if spec.role == "logit_index" else long).update(symbols)
    found = set()
    for node in program.calls(aten.linear.default, quantized_linear.target):
        rows: set[Any] = set()
        for size in _expressions(node.args[0].meta["val"])[:-1]:
            rows |= size.free_symbols
        batch = {size for size in rows if size in chosen and size in long}
        if rows & (chosen - long) and not rows & (long - batch):
            found.add(node)
    return found
