"""Relative output error of every linear layer of a rewritten program, each alone on the inputs that it had before.

    layer_errors(exact, rewritten, batches)      # {"model.layers.0.mlp.up_proj.weight": 0.031, …}

One definition for every method: ||y' - y|| / ||y|| over all tokens of the batches, where y is what the layer of the
exact program makes of its inputs x there, and y' is what stands in the rewritten program between the same two places,
made of the same x: rounded activations, outlier columns and thin factors included. Both programs must come from one,
with the same folds; what lies between is found by the names of nodes that no pass touched.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import structure
from graphwright.feeding import batch_inputs
from graphwright.program import Program

Place = tuple[fx.Node, fx.Node]
"""Where a layer's input and output are in the rewritten program."""


def layer_errors(exact: Program, rewritten: Program, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The error of each layer but the vocabulary head by the name of its weight; layers that are gone are left out."""
    head, twins = structure.head(exact), {node.name: node for node in rewritten.graph.nodes}
    layers = {node: str(weight.target) for node, weight in structure.linears(exact) if node is not head}
    places = {node: place for node in layers if (place := _place(node, twins)) is not None}
    wrong: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    for batch in batches:
        for node, x, expected in _run(exact, batch, places):
            source, output = places[node]
            actual = _between(rewritten, output, {source: x})
            wrong[layers[node]] += float((actual - expected).square().sum())
            whole[layers[node]] += float(expected.square().sum())
    return {name: (wrong[name] / max(whole[name], 1e-30)) ** 0.5 for name in wrong}


def _place(node: fx.Node, twins: Mapping[str, fx.Node]) -> Place | None:
    """Where a layer of the exact program begins and ends in the other one, if its surroundings are still there."""
    source: Any = node.args[0]
    for user in node.users:
        other = twins.get(user.name)
        if source.name in twins and other is not None and other.target is user.target:
            output = other.args[user.args.index(node)] if node in user.args else None
            if isinstance(output, fx.Node) and output.meta["val"].dim() == node.meta["val"].dim():
                return twins[source.name], output
    return None


def _run(program: Program, batch: Mapping[str, Tensor], wanted: Mapping[fx.Node, Place]) -> Iterable[Any]:
    """Runs a program, handing out (layer, its input, its output) as they come."""
    inputs = batch_inputs(program, batch)
    nodes = list(program.graph.nodes)
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = program.weight(node)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            if node in wanted:
                yield node, args[0], values[node]
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    del values[source]


def _between(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node that follows from weights and what is known."""
    if node not in values:
        if node.op == "get_attr":
            return program.weight(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: _between(program, source, values))
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
    return values[node]
