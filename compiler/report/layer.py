"""Choosing one decoder layer to show, by the shape of the dataflow and never by names.

Everything that one attention computes must leave through the residual stream: the nodes that lie on every path from
the first attention to the output (its post-dominators; Lengauer and Tarjan 1979) are that stream. The last of them
before the next attention is where a layer ends. Without attention, the longest run of ops that repeats is taken; a
small graph is shown whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import networkx
import torch
from torch import fx

from graphwright.program import Program
from graphwright.text import op_name

ATTENTION = {"attention", "scaled_dot_product_attention"}
SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
WHOLE, FIRST, LONGEST_LAYER, SEARCHED = 120, 120, 400, 2000


@dataclass(frozen=True)
class Selection:
    """The calls to show, in execution order, and what they are."""

    nodes: list[fx.Node]
    title: str
    start: fx.Node | None = None
    """The value that comes in from the layer before."""


def choose(program: Program) -> Selection:
    """One layer of `program`, or the best substitute."""
    calls = list(program.calls())
    found = _between_attentions(program)
    if found is not None:
        return found
    if len(calls) <= WHOLE:
        return Selection(calls, f"The whole graph, {len(calls)} ops")
    repeated = _repetition(calls)
    if repeated is not None:
        return repeated
    return Selection(calls[:FIRST], f"The first {FIRST} of {len(calls)} ops; no layer repeats")


def attentions(program: Program) -> list[fx.Node]:
    """The calls that weigh keys: fused attention, or else a softmax over four dimensions."""
    fused = [n for n in program.calls() if op_name(n.target).partition(".")[0] in ATTENTION]
    return fused or [
        n for n in program.calls() if op_name(n.target).partition(".")[0] in SOFTMAX and n.meta["val"].dim() == 4
    ]


def dataflow(program: Program) -> "networkx.DiGraph[fx.Node]":
    """Who feeds whom, without weights; a write in place feeds the later readers of what it wrote."""
    graph: networkx.DiGraph[fx.Node] = networkx.DiGraph()
    graph.add_nodes_from(n for n in program.graph.nodes if n.op != "get_attr")
    graph.add_edges_from((s, n) for n in graph.nodes for s in n.all_input_nodes if s.op != "get_attr")
    graph.add_edges_from(writes(program))
    return graph


def writes(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(writer, next reader) for every op that writes one of its arguments in place."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for node in program.calls():
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.is_write and isinstance(value, fx.Node):
                later = [user for user in value.users if order[user] > order[node]]
                if later:
                    yield node, min(later, key=order.__getitem__)


def _between_attentions(program: Program) -> Selection | None:
    """The layer in the middle: its span between two cuts of the residual stream that hold one attention."""
    layers = attentions(program)
    if len(layers) < 2:
        return None
    graph = dataflow(program)
    output = program.graph.output_node()
    after = networkx.immediate_dominators(graph.reverse(copy=False), output)
    reachable = [node for node in layers if node in after]
    spans = list(_spans(graph, after, output, reachable))
    if not spans:
        return None
    number, start, end = spans[len(spans) // 2]
    inside = _inside(graph, start, end)
    nodes = [n for n in program.calls() if n in inside]
    if not 0 < len(nodes) <= LONGEST_LAYER:
        return None
    return Selection(nodes, f"Layer {number} of {len(layers)}", start)


def _spans(
    graph: "networkx.DiGraph[fx.Node]",
    after: dict[fx.Node, fx.Node | None],
    output: fx.Node,
    layers: list[fx.Node],
) -> Iterator[tuple[int, fx.Node, fx.Node]]:
    """(number, residual value before, residual value after) of every layer but the first."""
    stream = _chain(after, layers[0], output) if layers else []
    entries = []
    for node in layers[1:]:
        above = networkx.ancestors(graph, node)
        entries.append(next((cut for cut in reversed(stream) if cut in above), None))
    for number, (start, end) in enumerate(pairwise(entries), start=2):
        if start is not None and end is not None and start is not end:
            yield number, start, end
    last = _last_end(after, output, layers, stream, entries) if entries else None
    if last is not None and entries[-1] is not None:
        yield len(layers), entries[-1], last


def _last_end(
    after: dict[fx.Node, fx.Node | None],
    output: fx.Node,
    layers: list[fx.Node],
    stream: list[fx.Node],
    entries: list[fx.Node | None],
) -> fx.Node | None:
    """Where the last layer ends: as many cuts after it joins the stream as the first layer had."""
    own = _chain(after, layers[-1], output)
    joined = next((steps for steps, cut in enumerate(own) if cut in stream), None)
    if joined is None or entries[0] is None:
        return None
    rest = stream.index(entries[0]) - joined
    index = stream.index(own[joined]) + rest
    return stream[index] if rest >= 0 and index < len(stream) else None


def _chain(after: dict[fx.Node, fx.Node | None], node: fx.Node, output: fx.Node) -> list[fx.Node]:
    """Every value that all paths from `node` to the output pass, in order."""
    chain: list[fx.Node] = []
    step = after.get(node)
    while step is not None and step is not output:
        chain.append(step)
        step = after.get(step)
    return chain


def _inside(graph: "networkx.DiGraph[fx.Node]", start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """What `end` needs beyond `start` and what came before it, with the writes that hang on it."""
    before = networkx.ancestors(graph, start) | {start}
    inside = (networkx.ancestors(graph, end) | {end}) - before
    hanging = {user for node in inside for user in graph.successors(node) if not graph.out_degree(user)}
    for node in [n for n in hanging if n.op == "call_function"]:
        inside |= (networkx.ancestors(graph, node) | {node}) - before
    return inside


def _repetition(calls: list[fx.Node]) -> Selection | None:
    """One period of the longest run in which the sequence of ops equals itself some steps later."""
    names = [op_name(node.target) for node in calls[:SEARCHED]]
    best_length, best_start, best_period = 0, 0, 0
    for period in range(3, min(len(names) // 2, LONGEST_LAYER) + 1):
        run = 0
        for index in range(len(names) - period):
            run = run + 1 if names[index] == names[index + period] else 0
            if run >= period and run + period > best_length:
                best_length, best_start, best_period = run + period, index - run + 1, period
    if not best_length or len(set(names[best_start : best_start + best_period])) < 2:
        return None
    copies = best_length // best_period
    start = best_start + best_period * (copies // 2)
    return Selection(calls[start : start + best_period], f"One of {copies} repetitions, {best_period} ops")
