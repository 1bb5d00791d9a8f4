"""Engines built in this process by torch_tensorrt, for `torch.compile(..., options={"backend": "tensorrt"})`.

The program is handed over in the form of `handover`, with the converters of `converters`; torch_tensorrt partitions it,
builds an engine for each part that it takes, and leaves the rest to PyTorch. Engines are for ranges of sizes: from the
smallest that the program allows to twice those of the first call. Sizes beyond build engines anew.

Either distribution serves: `torch-tensorrt`, which builds with TensorRT, and `torch-tensorrt-rtx`.
"""

import importlib
import importlib.util
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.backends.tensorrt.handover import ORIGIN, Handover, Sizes
from graphwright.errors import BackendError
from graphwright.op import op_of
from graphwright.program import Program
from graphwright.target import local_gpu
from graphwright.text import op_name

AHEAD = "Use graphwright compile --target tensorrt:sm_89, which builds engines ahead of time, on any machine"

SMALLEST = 4
"""Operators below which a part is not worth an engine."""

SHOWN = 5
"""Nodes that a warning names; `left` names all of them."""

ENGINE, LEFT = "_run_on_acc", "_run_on_gpu"
"""How torch_tensorrt names the parts of a partitioned graph."""


def require_torch_tensorrt() -> None:
    """Refuses to go on where the package or the GPU is missing.

    Raises:
        BackendError: says which, and what to install or do instead.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise BackendError(
            "torch.compile with the tensorrt backend needs the package torch-tensorrt, which is not installed",
            fix=f"pip install 'graphwright[torch-tensorrt]'. {AHEAD}",
        )
    if local_gpu() is None:
        raise BackendError(
            "torch.compile with the tensorrt backend runs on the GPU at hand, and PyTorch can use none here",
            fix=f"Use a machine with an NVIDIA GPU and a CUDA build of PyTorch. {AHEAD}",
        )


def torch_tensorrt(otherwise: str = AHEAD) -> Any:
    """The package, with our converters registered.

    Args:
        otherwise: what an error names as the other way.

    Raises:
        BackendError: it is installed and cannot be imported, for want of TensorRT's libraries for instance.
    """
    try:
        package = importlib.import_module("torch_tensorrt")
        importlib.import_module("graphwright.backends.tensorrt.converters")
    except Exception as error:
        # Its import fails with bare exceptions of several kinds where a library is missing.
        raise BackendError(
            f"torch_tensorrt is installed and cannot be imported: {error}",
            fix="pip install 'graphwright[torch-tensorrt]' into an environment with a CUDA build of PyTorch. "
            + otherwise,
        ) from error
    return package


class TensorrtRegion:
    """A program that torch_tensorrt compiles at the first call, over the contract's inputs in order.

    Attributes:
        left: every node that runs in PyTorch, by name, with the reason; known after the first call.
    """

    def __init__(self, program: Program) -> None:
        self.left: dict[str, str] = {}
        self._program = program
        self._module: Handover | None = None
        self._run: Any = None
        self._ranges: dict[str, Sizes] = {}

    def __call__(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Runs the engines, and the rest between them; what the program writes into its inputs is copied there.

        Raises:
            BackendError: torch_tensorrt does not build an engine; its own words are given.
        """
        contract = self._program.contract
        sizes = contract.check(dict(zip(contract.names, arguments, strict=True)))
        if self._run is None or not all(low <= sizes[n] <= high for n, (low, _, high) in self._ranges.items()):
            self._build(arguments, sizes)
        made = self._run(*arguments)
        made = made if isinstance(made, (tuple, list)) else (made,)
        assert self._module is not None  # noqa: S101
        kept = len(contract.outputs)
        for name, value in zip(self._module.written, made[kept:], strict=True):
            arguments[contract.names.index(name)].copy_(value)
        return tuple(made[:kept])

    def _build(self, arguments: Sequence[Tensor], sizes: Mapping[str, int]) -> None:
        package = torch_tensorrt()
        if self._module is None:
            self._module = Handover(self._program, arguments[0].device)
        self._ranges = ranges(self._program, sizes)
        archive = self._module.exported(arguments, self._ranges)
        inputs = [
            _input(package, one, spec, self._ranges) for one, spec in zip(arguments, _specs(self._program), strict=True)
        ]
        try:
            self._run = package.dynamo.compile(
                archive, arg_inputs=inputs, min_block_size=SMALLEST, attn_bias_is_causal=False
            )
        except Exception as error:
            # Builders and converters raise whatever comes; there is no fallback that a user would not notice.
            raise BackendError(f"torch_tensorrt does not compile the region: {error}", fix=AHEAD) from error
        self.left = left_out(self._run, package.dynamo.conversion.DYNAMO_CONVERTERS)
        if self.left:
            warnings.warn(summary(self.left), stacklevel=2)


def ranges(program: Program, sizes: Mapping[str, int]) -> dict[str, Sizes]:
    """Sizes that an engine serves, by dimension: up to twice those at hand. A size of one is a case of its own."""
    found = {}
    for dim in program.contract.dims:
        size = sizes.get(dim.name, dim.min)
        found[dim.name] = (1, 1, 1) if size == 1 else (max(dim.min, 2), size, min(dim.max, 2 * size))
    return found


def left_out(partitioned: fx.GraphModule, registry: Any) -> dict[str, str]:
    """The program's nodes that are in no engine, by name, each with the reason.

    Args:
        partitioned: what torch_tensorrt made.
        registry: its converters; a node is in it where one takes the node.
    """
    found: dict[str, str] = {}
    for node in _torch_nodes(partitioned):
        name = node.meta.get("custom", {}).get(ORIGIN, node.name)
        found.setdefault(name, reason(node, registry))
    return found


def _torch_nodes(partitioned: fx.GraphModule) -> Iterator[fx.Node]:
    parts = [part for name, part in partitioned.named_children() if LEFT in name and isinstance(part, fx.GraphModule)]
    for module in (partitioned, *parts):
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is not operator.getitem and _makes_tensor(node):
                yield node


def _makes_tensor(node: fx.Node) -> bool:
    """Arithmetic on sizes is nobody's work."""
    return not isinstance(node.meta.get("val"), (torch.SymInt, int))


def reason(node: fx.Node, registry: Any) -> str:
    """Why a node of what was handed over is in no engine."""
    from graphwright.backends.tensorrt.converters import refusal

    name = op_name(node.target)
    if op_of(node.target) is not None:
        own = refusal(node)
        if own:
            return own
    if node in registry:
        return f"torch_tensorrt takes {name}, and its part between nodes that stay out is too small"
    return f"torch_tensorrt has no converter for this {name}"


def summary(left: Mapping[str, str]) -> str:
    """One sentence that names the nodes that run in PyTorch, and why."""
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:SHOWN])
    more = f"; and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    return f"{len(left)} nodes run in PyTorch between TensorRT engines: {shown}{more}"


def _specs(program: Program) -> tuple[Any, ...]:
    return (*program.contract.inputs, *program.contract.state)


def _input(package: Any, tensor: Tensor, spec: Any, known: Mapping[str, Sizes]) -> Any:
    """An input as torch_tensorrt asks for it: three shapes where a size is free."""
    shapes = [tuple(known[d][end] if isinstance(d, str) else d for d in spec.shape) for end in range(3)]
    if shapes[0] == shapes[2]:
        return package.Input(shape=shapes[0], dtype=tensor.dtype)
    return package.Input(min_shape=shapes[0], opt_shape=shapes[1], max_shape=shapes[2], dtype=tensor.dtype)
