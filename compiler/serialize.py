"""Graphs as plain JSON, without pickle: loading one runs no code but the ops it names.

Only overloads of registered torch ops and a short list of Python functions on sizes can be named, so a file from
elsewhere cannot smuggle in a callable.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import graphwright.ops  # noqa: F401  (registers the semantic ops that a graph may name)
from graphwright.contract import DTYPES, dtype_name
from graphwright.errors import ArtifactError

PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{function.__module__.lstrip('_')}.{function.__name__}": function
    for function in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
        operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
        operator.ge, operator.and_, operator.or_, operator.pow, math.ceil, math.floor, math.trunc,
        torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite,
    )
}  # fmt: skip
"""What a graph may call besides torch ops."""


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One entry per node.

    Raises:
        ArtifactError: a node calls something that cannot be named in a file.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": [_encode(argument) for argument in node.args],
            "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
            **({"origin": node.meta["origin"]} if "origin" in node.meta else {}),
        }
        for node in graph.nodes
    ]


def graph_from_json(entries: list[dict[str, Any]], weights: Mapping[str, Tensor]) -> fx.GraphModule:
    """Rebuilds the graph module over `weights`; it runs, and its nodes have no shapes yet."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in entries:
        target = _target(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        args = tuple(_decode(argument, nodes) for argument in entry["args"])
        kwargs = {key: _decode(value, nodes) for key, value in entry["kwargs"].items()}
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        if "origin" in entry:
            node.meta["origin"] = entry["origin"]
        nodes[entry["name"]] = node
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            set_attribute(root, str(node.target), weights[str(node.target)])
    return fx.GraphModule(root, graph)


def set_attribute(module: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor at a dotted path as a buffer, making the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module._parameters.pop(last, None)
    module._buffers.pop(last, None)
    module.__dict__.pop(last, None)
    module.register_buffer(last, tensor)


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}::{target._opname}.{target._overloadname}"
    for name, function in PYTHON_FUNCTIONS.items():
        if function is target:
            return name
    raise ArtifactError(f"The graph calls {target}, which cannot be written to a file", where=f"node {node.name}")


def _target(name: str) -> Callable[..., Any]:
    if name in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[name]
    namespace, _, rest = name.partition("::")
    op_name, _, overload = rest.partition(".")
    try:
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), op_name), overload)
    except AttributeError as missing:
        raise ArtifactError(
            f"The graph calls {name}, which this installation does not know",
            fix="Load it with the versions that the manifest names",
        ) from missing
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(f"An argument of type {type(value).__name__} cannot be written to a file")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "dtype":
        return DTYPES[content]
    if kind == "device":
        return torch.device(content)
    if kind in ("layout", "memory_format"):
        return getattr(torch, content)
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    return float(content)
