"""Canonical text of a graph, for golden tests, diffs and dumps.

    %3 = rms_norm(%1, model.norm.weight, 1e-05) : float32[batch, sequence, 576]

Nodes are numbered by position, so two captures of one model give the same text; weights are named where they are
used instead of taking a line each.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphwright.contract import Contract, dtype_name

if TYPE_CHECKING:
    from graphwright.program import Program


def render(program: "Program", *, shapes: bool = True, numbered: bool = True) -> str:
    """The text of `program`; `numbered=False` keeps node names, which survive edits, for differences."""
    names = symbol_names(program.graph, program.contract)
    labels: dict[fx.Node, str] = {}
    lines = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            labels[node] = str(node.target)
            continue
        if node.op == "placeholder":
            labels[node] = f"%{node.target}"
            left = labels[node]
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], labels)}")
            continue
        else:
            labels[node] = f"%{len(lines)}" if numbered else f"%{node.name}"
            left = f"{labels[node]} = {op_name(node.target)}({_arguments(node, labels)})"
        suffix = f" : {describe(node.meta.get('val'), names)}" if shapes else ""
        lines.append(left + suffix)
    return "\n".join(lines) + "\n"


def op_name(target: Any) -> str:
    """A short name: `linear` for `aten.linear.default`, `add.Tensor` for `aten.add.Tensor`."""
    if isinstance(target, torch._ops.OpOverload):
        name: str = target._opname
        return name if target._overloadname in ("", "default") else f"{name}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def symbol_names(graph: fx.Graph, contract: Contract) -> dict[str, str]:
    """Maps the shape symbols of a graph's placeholders to the contract's dimension names."""
    names: dict[str, str] = {}
    specs = {spec.name: spec for spec in (*contract.inputs, *contract.state)}
    for node in graph.nodes:
        value = node.meta.get("val")
        spec = specs.get(str(node.target)) if node.op == "placeholder" else None
        if spec is None or not isinstance(value, torch.Tensor):
            continue
        for size, dim in zip(value.shape, spec.shape, strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                names.setdefault(str(size), dim)
    return names


def describe(value: Any, names: Mapping[str, str]) -> str:
    """`float32[batch, 9]` for a tensor, its expression for a symbolic number."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_named(str(size), names) for size in value.shape)
        return f"{dtype_name(value.dtype)}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(describe(item, names) for item in value)})"
    return _named(str(value), names)


def _named(expression: str, names: Mapping[str, str]) -> str:
    for symbol, name in names.items():
        expression = expression.replace(symbol, name)
    return expression


def _arguments(node: fx.Node, labels: Mapping[fx.Node, str]) -> str:
    positional = [_argument(argument, labels) for argument in node.args]
    named = [f"{key}={_argument(value, labels)}" for key, value in node.kwargs.items()]
    return ", ".join(positional + named)


def _argument(value: Any, labels: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return labels[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, labels) for item in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(value)
