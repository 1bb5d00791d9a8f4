"""Finding parts of a model by their place in the dataflow, never by their names."""

import torch
from torch import Tensor, fx

from graphwright.ops import quantized_linear
from graphwright.program import Program

aten = torch.ops.aten

HEADS = {aten.linear.default, quantized_linear.target}

POINTWISE = {
    aten.add.Tensor,
    aten.clamp.default,
    aten.div.Tensor,
    aten.mul.Tensor,
    aten.sub.Tensor,
    aten.tanh.default,
    aten.to.dtype,
}
"""What may stand between the head and the output: it treats every position alike."""


def head(program: Program) -> fx.Node | None:
    """The linear layer that makes the first output [batch, positions, vocabulary], or None."""
    outputs = program.graph.output_node().args[0]
    node = outputs[0] if isinstance(outputs, (list, tuple)) and outputs else None
    while isinstance(node, fx.Node) and node.target in POINTWISE:
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(sources) != 1:
            return None
        node = sources[0]
    if not isinstance(node, fx.Node) or node.target not in HEADS or node.meta["val"].dim() != 3:
        return None
    return node


def linears(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Every linear layer with a constant floating-point weight matrix: (call, weight)."""
    found = []
    for node in program.calls(aten.linear.default):
        weight = node.args[1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            value: Tensor = weight.meta["val"]
            if value.dim() == 2 and value.is_floating_point():
                found.append((node, weight))
    return found


def embeddings(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Every lookup of token ids in a constant table: (call, table)."""
    tokens = {spec.name for spec in program.contract.inputs if spec.role == "token"}
    found = []
    for node in program.calls(aten.embedding.default):
        table, index = node.args[0], node.args[1]
        while isinstance(index, fx.Node) and index.target in (aten.view.default, aten.reshape.default):
            index = index.args[0]
        is_token = isinstance(index, fx.Node) and index.op == "placeholder" and str(index.target) in tokens
        if is_token and isinstance(table, fx.Node) and table.op == "get_attr":
            found.append((node, table))
    return found
