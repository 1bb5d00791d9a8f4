"""Cutting a program into regions, so that the thirty equal layers of a model are compiled once.

    prologue | body, body, body, … | epilogue

The body is found structurally, never by names: every call gets a signature (target, plain arguments, shapes and
dtypes), the period that covers most of the sequence of signatures is taken, and then every argument is looked at.
It must be the same place of the same repetition, the same place of the one before (a carried value, such as the
residual stream), or come from outside (weights, caches, values of the prologue), with its own source in every
repetition. Where no such period exists the whole graph is one region.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from graphwright.backends.inductor.subgraph import Region, Source, is_size, make_region, source_of, tensor_arguments
from graphwright.program import Program

MIN_REPETITIONS, MIN_PERIOD = 3, 6
"""Fewer or smaller repetitions are not worth a call each."""

SMALL = 1 << 16
"""Elements of a constant that index computations may read, such as rotary frequencies."""


@dataclass(frozen=True)
class Call:
    """One run of a region: where its inputs come from and the names of the values it makes."""

    region: int
    sources: tuple[Source, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Regions, the calls of them in order, and where the program's outputs come from."""

    regions: tuple[Region, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Source, ...]


@dataclass(frozen=True)
class Repeat:
    """`count` equal pieces of `period` nodes from `start`."""

    start: int
    period: int
    count: int


def plan_regions(program: Program) -> Plan:
    """The plan of a program after all passes."""
    groups = _cut(program)
    regions, calls = [], []
    for name, repetitions in groups:
        region, sources, outputs = make_region(program, name, repetitions)
        regions.append(region)
        calls += [Call(len(regions) - 1, s, o) for s, o in zip(sources, outputs, strict=True)]
    returned = program.graph.output_node().args[0]
    return Plan(tuple(regions), tuple(calls), tuple(source_of(program, n) for n in returned))


def _cut(program: Program) -> list[tuple[str, list[list[fx.Node]]]]:
    early, rest = _split_index_nodes(program)
    repeat = find_repeat(rest)
    if repeat is None:
        return [("whole", [early + rest])]
    end = repeat.start + repeat.period * repeat.count
    body = [rest[i : i + repeat.period] for i in range(repeat.start, end, repeat.period)]
    head, tail = rest[: repeat.start], rest[end:]
    used = _ancestors([*head, *rest[repeat.start : end]])
    groups = [
        ("prologue", [[n for n in early if n in used] + head]),
        ("body", body),
        ("epilogue", [[n for n in early if n not in used] + tail]),
    ]
    return [(name, parts) for name, parts in groups if parts[0]]


def _split_index_nodes(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """Calls that follow from indices alone (positions, masks, rotary tables), and all other calls that make tensors.

    The first kind may move to the front. A model often computes it in its first layer and uses it in all.
    """
    state = {spec.name for spec in program.contract.state}
    early: set[fx.Node] = set()
    order: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if str(node.target) not in state and not value.is_floating_point():
                early.add(node)
        elif node.op == "get_attr":
            if value.numel() <= SMALL and value.dim() < 2:
                early.add(node)
        elif node.op == "call_function" and is_size(node):
            early.add(node)
        elif node.op == "call_function":
            is_early = isinstance(value, Tensor) and _is_pure(node) and all(n in early for n in node.all_input_nodes)
            if is_early:
                early.add(node)
            order[0 if is_early else 1].append(node)
    return order


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def find_repeat(nodes: Sequence[fx.Node]) -> Repeat | None:
    """The repetition that covers most nodes and holds up under inspection, or None."""
    table: dict[Any, int] = {}
    ids = numpy.array([table.setdefault(_signature(node), len(table)) for node in nodes])
    candidates = []
    for period in range(MIN_PERIOD, len(nodes) // MIN_REPETITIONS + 1):
        start, run = _longest_run(ids[period:] == ids[:-period])
        count = (run + period) // period
        if count >= MIN_REPETITIONS:
            candidates.append((-count * period, period, start, run + period - count * period))
    for covered, period, start, slack in sorted(candidates):
        count = -covered // period
        found = [
            (carried, Repeat(start + offset, period, count))
            for offset in range(slack + 1)
            if (carried := _carried(nodes, Repeat(start + offset, period, count))) is not None
        ]
        if found:
            return min(found, key=lambda item: item[0])[1]
    return None


def _longest_run(equal: numpy.ndarray) -> tuple[int, int]:
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[0], equal.astype(numpy.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    best = int(numpy.argmax(ends - starts))
    return int(starts[best]), int(ends[best] - starts[best])


def _signature(node: fx.Node) -> str:
    """What must agree in all repetitions, as text."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), _describe)
    return f"{node.target} {args} {sorted(kwargs.items())} {_value(node)}"


class _Described(str):
    """Prints as it is."""

    __repr__ = str.__str__


def _describe(node: fx.Node) -> Any:
    if is_size(node):
        return _Described(f"size({node.meta['val']})")
    return _Described(f"{'weight' if node.op == 'get_attr' else 'tensor'}({_value(node)})")


def _value(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__


def _carried(nodes: Sequence[fx.Node], repeat: Repeat) -> int | None:
    """How many values each repetition takes from the one before; None if the repetitions are not isomorphic."""
    end = repeat.start + repeat.period * repeat.count
    place = {node: index - repeat.start for index, node in enumerate(nodes) if repeat.start <= index < end}
    pattern: dict[tuple[int, int], tuple[str, int]] = {}
    carried: set[int] = set()
    for node, index in place.items():
        repetition, inner = divmod(index, repeat.period)
        for position, source in enumerate(tensor_arguments(node)):
            kind = _kind(place.get(source), repetition, repeat.period)
            if kind is None:
                return None
            known = pattern.setdefault((inner, position), kind)
            if repetition == 1 and kind[0] == "carried" and known[0] == "outside":
                pattern[(inner, position)] = kind
                carried.add(kind[1])
            elif kind != known:
                return None
    return len(carried)


def _kind(place: int | None, repetition: int, period: int) -> tuple[str, int] | None:
    if place is None:
        return "outside", 0
    origin, inner = divmod(place, period)
    if origin == repetition:
        return "inside", inner
    return ("carried", inner) if origin == repetition - 1 else None
