"""Partition: a program as parts that run one after the other, each wholly taken by a backend or wholly left out.

    parts = partition(program, lambda node: backend.supports(node, target).ok)
    values = dict(tensors)                      # inputs and state by name
    for part in parts:
        values |= dict(zip(part.program.contract.outputs, run(part, values)))

Nodes are put into levels: a node belongs to the latest level of what it reads, or to the next where that level is of
the other kind. Levels of one kind so alternate with the other, there are as few as the longest chain of changes, and no
level reads from a later one. What touches the same memory keeps its order where any node writes it, through views too:
state, and inputs of a region that dynamo hands over. Arithmetic on sizes belongs to nobody: each
part that needs a size computes it from its own tensors.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphwright.clean import base_of, written
from graphwright.contract import Contract, Dim, InputSpec
from graphwright.errors import BackendError
from graphwright.program import Program
from graphwright.rewrite import describe
from graphwright.text import symbol_names


@dataclass(frozen=True)
class Part:
    """Some nodes of a program as a program of their own, over the same weights and the same state.

    Attributes:
        taken: whether the backend takes all of its nodes.
        program: its inputs and outputs are the whole program's, or values of other parts.
        nodes: names of the whole program's nodes that it runs.
        sizes: dimensions of its contract that the whole program has no name for, over those that it has.
        sources: names of the whole program's nodes whose values it takes, weights apart.
    """

    taken: bool
    program: Program
    nodes: tuple[str, ...]
    sizes: dict[str, sympy.Expr] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


def partition(program: Program, taken: Callable[[fx.Node], bool]) -> list[Part]:
    """The program's parts in the order in which they run; a program without calls has none.

    Raises:
        BackendError: a value that two parts share has a size that depends on data.
    """
    levels = assign_levels(program, taken)
    order: dict[int, list[fx.Node]] = {}
    for node, level in levels.items():
        order.setdefault(level, []).append(node)
    cutter = _Cutter(program, levels)
    return [cutter.part(order[level], bool(level % 2)) for level in sorted(order)]


def assign_levels(program: Program, taken: Callable[[fx.Node], bool]) -> dict[fx.Node, int]:
    """The level of every call that makes tensors: odd ones are taken, even ones are left out."""
    changing = written(program.module)
    levels: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for node in program.calls():
        if _is_size(node):
            continue
        if node.target.__name__ == "getitem":
            levels[node] = levels[node.args[0]]  # of several results, which do not leave their part
            continue
        touched = {base_of(n) for n in node.all_input_nodes if n in changing}
        sources = [levels[n] for n in _tensors(node) if n in levels] + [last[n] for n in touched if n in last]
        least = max(sources, default=0)
        levels[node] = least if least % 2 == taken(node) else least + 1
        last |= dict.fromkeys(touched, levels[node])
    return levels


def too_small(part: Part, parts: Sequence[Part], least: int) -> bool:
    """Whether a part that is taken has fewer nodes than `least` and no weight matrix, and is not the only part."""
    matrices = (n for n in part.program.graph.nodes if n.op == "get_attr" and n.meta["val"].dim() > 1)
    return part.taken and len(parts) > 1 and len(part.nodes) < least and next(matrices, None) is None


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _tensors(node: fx.Node) -> list[fx.Node]:
    """What a node needs that is no size, looking through arithmetic on sizes."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        found += _tensors(source) if _is_size(source) else [source]
    return found


class _Cutter:
    """Copies the nodes of a level into a program of their own."""

    def __init__(self, program: Program, levels: Mapping[fx.Node, int]) -> None:
        self._program, self._levels = program, levels
        self._symbols = symbol_names(program.graph, program.contract)
        self._specs = {spec.name: spec for spec in (*program.contract.inputs, *program.contract.state)}
        self._names: dict[fx.Node, str] = {}
        outputs: Any = program.graph.output_node().args[0]
        for node, name in zip(outputs, program.contract.outputs, strict=True):
            if node.op == "placeholder" or node in self._names or node.op == "get_attr":
                raise BackendError(f"Output {name} is no value of its own", where=describe(node))
            self._names[node] = name

    def part(self, nodes: Sequence[fx.Node], taken: bool) -> Part:
        """The part of one level."""
        mine = set(nodes)
        sizes: dict[str, sympy.Expr] = {}
        outside = dict.fromkeys(n for node in nodes for n in _tensors(node) if n not in mine and n.op != "get_attr")
        order = {node: index for index, node in enumerate(self._program.graph.nodes)}
        sources = sorted(outside, key=order.__getitem__)
        contract = self._program.contract
        held = {spec.name for spec in contract.state}
        specs = [
            self._spec(node, sizes) for node in sources if str(node.target) not in held or node.op != "placeholder"
        ]
        state = tuple(spec for spec in contract.state if any(str(n.target) == spec.name for n in sources))
        made = [node for node in nodes if self._leaves(node, mine)]
        dims = (*contract.dims, *(self._dim(name, size) for name, size in sizes.items()))
        own = Contract(tuple(specs), tuple(self._name(node) for node in made), dims, state)
        order_of = {name: index for index, name in enumerate(own.names)}
        sources.sort(key=lambda node: order_of[self._name(node)])
        module = fx.GraphModule(self._program.module, self._graph(sources, nodes, made))
        program = Program(module, own, self._program.metadata)
        return Part(taken, program, tuple(node.name for node in nodes), sizes, tuple(n.name for n in sources))

    def _graph(self, sources: Sequence[fx.Node], nodes: Sequence[fx.Node], made: Sequence[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in sources:
            copies[node] = graph.placeholder(self._name(node))
            copies[node].meta = {"val": node.meta["val"]}

        def copied(node: fx.Node) -> fx.Node:
            """Weights and sizes are copied where they are first read."""
            if node not in copies:
                copies[node] = graph.node_copy(node, copied)
                copies[node].meta = copy.copy(node.meta)
            return copies[node]

        for node in nodes:
            copied(node)
        graph.output(tuple(copies[node] for node in made))
        return graph

    def _leaves(self, node: fx.Node, mine: set[fx.Node]) -> bool:
        """Whether anything outside of the part reads a value, through sizes too."""
        if not isinstance(node.meta.get("val"), Tensor):
            return False
        readers = list(node.users)
        while readers:
            reader = readers.pop()
            if _is_size(reader):
                readers += reader.users
            elif reader not in mine:
                return True
        return False

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return str(node.target)
        return self._names.get(node, f"{node.name}_value")

    def _spec(self, node: fx.Node, sizes: dict[str, sympy.Expr]) -> InputSpec:
        if node.op == "placeholder":
            return self._specs[str(node.target)]  # type: ignore[return-value]
        value: Tensor = node.meta["val"]
        shape = tuple(self._size(node, size, sizes) for size in value.shape)
        return InputSpec(self._name(node), value.dtype, shape)

    def _size(self, node: fx.Node, size: Any, sizes: dict[str, sympy.Expr]) -> int | str:
        """A size as the contract says it; one without a name gets one, and equal ones the same."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        known = {symbol: self._symbols.get(str(symbol)) for symbol in size.node.expr.free_symbols}
        if None in known.values():
            raise BackendError("A size depends on data, so no part can begin here", where=describe(node))
        expression = size.node.expr.subs({s: sympy.Symbol(name, integer=True) for s, name in known.items()})
        if expression.is_Symbol:
            return str(expression)
        if expression.is_Integer:
            return int(expression)
        name = next((name for name, other in sizes.items() if other == expression), f"size_{len(sizes)}")
        sizes[name] = expression
        return name

    def _dim(self, name: str, size: sympy.Expr) -> Dim:
        dims = {symbol: self._program.contract.dim(str(symbol)) for symbol in size.free_symbols}
        ends = [int(size.subs({s: getattr(d, end) for s, d in dims.items()})) for end in ("min", "max")]
        return Dim(name, *ends)


__all__ = ["Part", "assign_levels", "partition", "too_small"]
