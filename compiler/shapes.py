"""Shapes of every node, by running the graph on fake tensors with the contract's symbolic dimensions."""

import itertools
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphwright.contract import Contract, InputSpec, StateSpec, resolve

HINT_PRIMES = (3, 7, 13, 17, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101)
"""Example sizes of the symbolic dimensions: distinct, so that duck shaping ties equal names and no others."""


class ContractMode(FakeTensorMode):
    """A fake mode whose symbols are the dimensions of a contract."""

    def __init__(self) -> None:
        super().__init__(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)

    def placeholder(self, spec: InputSpec | StateSpec, contract: Contract) -> FakeTensor:
        """A fake tensor for an input or state; equal dimension names share one symbol."""
        example = torch.empty(resolve(spec.shape, _hints(contract)), dtype=spec.dtype)
        dynamic = [DimDynamic.DUCK if isinstance(d, str) else DimDynamic.STATIC for d in spec.shape]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)  # type: ignore[var-annotated]
        return self.from_tensor(example, symbolic_context=context)


def _hints(contract: Contract) -> dict[str, int]:
    used: set[int] = set()
    hints = {}
    for dim, prime in zip(contract.dims, itertools.chain(HINT_PRIMES, itertools.count(103, 2)), strict=False):
        size = max(dim.min, min(prime, dim.max))
        while size in used and size < dim.max:
            size += 1
        used.add(size)
        hints[dim.name] = size
    return hints


def propagate(module: fx.GraphModule, contract: Contract) -> None:
    """Sets `meta["val"]` of every node of `module`."""
    mode = ContractMode()
    fakes = {spec.name: mode.placeholder(spec, contract) for spec in (*contract.inputs, *contract.state)}
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = fakes[str(node.target)]
        elif node.op != "output":
            values[node] = compute(node, mode, module)
        node.meta["val"] = values.get(node)


def update(module: fx.GraphModule, changed: set[fx.Node]) -> None:
    """Recomputes `meta["val"]` of everything that depends on the nodes in `changed`."""
    mode = mode_of(module.graph)
    stale = set(changed)
    for node in module.graph.nodes:
        if node.op == "call_function" and (node in stale or stale.intersection(node.all_input_nodes)):
            node.meta["val"] = compute(node, mode, module)
            stale.add(node)


def compute(node: fx.Node, mode: FakeTensorMode, module: fx.GraphModule) -> Any:
    """The fake value of one node, from the `meta["val"]` of its inputs."""
    if node.op == "get_attr":
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, torch.Tensor) else value
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)


def mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the graph's shapes live in."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())
