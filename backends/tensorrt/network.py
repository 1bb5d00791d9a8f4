"""A handed-over program as a TensorRT network, written by torch_tensorrt's converters and ours.

    module = lowered(archive)                          # as the converters want it
    reasons = refusals(module)                         # {node of the program: reason}; empty if all have converters
    draft = write(module, contract, outputs)           # the network, with the names that the executable looks for

This module is imported where torch_tensorrt is, inside `no_gpu.questions_answered`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch_tensorrt
from torch import fx
from torch_tensorrt.dynamo import CompilationSettings, lowering
from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS, ConversionContext
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

from graphwright.backends.onnx.naming import tensor_name
from graphwright.backends.tensorrt import converters, jit
from graphwright.backends.tensorrt.engine import RTX, BuildError, Draft
from graphwright.backends.tensorrt.handover import ORIGIN
from graphwright.contract import Contract
from graphwright.text import op_name

NAME = f"torch_tensorrt.dynamo {torch_tensorrt.__version__}"

LIBRARY = RTX if torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx else "tensorrt"
"""The library that this distribution of torch_tensorrt builds with."""

ON_GPU = (torch.ops.aten.empty_permuted.default, torch.ops.aten.empty_strided.default)
"""Operators that torch_tensorrt decomposes into tensors on the GPU at hand, where nothing of a part lies: they stay."""


def settings() -> CompilationSettings:
    """How programs are lowered and converted: as `torch_tensorrt.dynamo.compile` does unless it is told otherwise."""
    return CompilationSettings(attn_bias_is_causal=False)


def lowered(archive: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program after torch_tensorrt's own decompositions and passes."""
    chosen = settings()
    archive = lowering.pre_export_lowering(archive, chosen)
    table = lowering.get_decompositions(chosen.enable_experimental_decompositions, chosen.decompose_attention)
    archive = archive.run_decompositions({op: form for op, form in table.items() if op not in ON_GPU})
    module: fx.GraphModule = lowering.post_lowering(archive.module(), chosen)
    return module


def refusals(module: fx.GraphModule) -> dict[str, str]:
    """Nodes of the program of which something has no converter, by name, each with the reason."""
    DYNAMO_CONVERTERS.set_compilation_settings(settings())
    reasons = ((node, _reason(node)) for node in module.graph.nodes if node.op == "call_function")
    return {origin(node): reason for node, reason in reasons if reason}


def _reason(node: fx.Node) -> str:
    """Why a node has no converter; empty if it has one."""
    try:
        return "" if node in DYNAMO_CONVERTERS else jit.reason(node, DYNAMO_CONVERTERS)
    except Exception as error:
        # Its checks of a node's arguments fail on forms that they do not expect.
        return f"torch_tensorrt cannot say whether it takes {op_name(node.target)}: {error}"


def origin(node: fx.Node) -> str:
    """The node of the program that a node comes from; itself if it comes from none."""
    return str(node.meta.get("custom", {}).get(ORIGIN, node.name))


def write(module: fx.GraphModule, contract: Contract, outputs: Sequence[str]) -> tuple[Draft, Any]:
    """The network of a lowered program.

    Args:
        module: over the contract's inputs and state, in order.
        contract: whose dimensions the network's inputs name.
        outputs: names of what `module` returns.

    Returns:
        The network, and what has to live until the engine is built: it holds the weights.

    Raises:
        BuildError: a converter failed; names the node.
    """
    writer = Writer(module, contract, outputs)
    writer.write()
    return writer.draft, writer


class Writer(TRTInterpreter):  # type: ignore[misc]
    """Walks a graph as torch_tensorrt does, and names inputs, outputs and layers as we do."""

    builder: Any
    ctx: Any

    def __init__(self, module: fx.GraphModule, contract: Contract, outputs: Sequence[str]) -> None:
        super().__init__(module, (), compilation_settings=settings())
        # Its own builder goes before ours comes: the library keeps the log of the first for all that live together.
        del self.builder, self.ctx
        self.draft = Draft.begin(LIBRARY)
        self.builder, self.ctx = self.draft.builder, ConversionContext(self.draft.network, settings())
        self._specs: Iterator[Any] = iter((*contract.inputs, *contract.state))
        self._outputs = tuple(map(tensor_name, outputs))

    def write(self) -> None:
        """Every node, without building: that asks for a GPU at its end."""
        fx.Interpreter.run(self)

    def run_node(self, n: fx.Node) -> Any:
        """One node; its layers get names that say which node of the program they compute."""
        first = self.ctx.net.num_layers
        try:
            made = super().run_node(n)
        except Exception as error:
            # Converters raise whatever comes.
            raise BuildError(f"{origin(n)}/Convert_0 ({n.target}): {error}") from error
        for index in range(first, self.ctx.net.num_layers):
            layer = self.ctx.net.get_layer(index)
            layer.name = f"{origin(n)}/{layer.type.name}_{index}"
            layer.metadata = f"[Layer: {layer.name}]"
        return made

    def placeholder(self, target: str, args: Any, kwargs: Any) -> Any:
        """An input by the name and with the dimensions that the contract gives it."""
        spec = next(self._specs)
        shape = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
        made = self.ctx.net.add_input(tensor_name(spec.name), converters.DTYPES[spec.dtype], shape)
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                made.set_dimension_name(axis, size)
        return made

    def output(self, target: str, args: Any, kwargs: Any) -> Any:
        """Every output as a tensor of its own, in the dtype of the program: two may be one value, or an input."""
        nodes: Any = self.module.graph.output_node().args[0]
        for name, value, node in zip(self._outputs, args[0], nodes, strict=True):
            tensor = get_trt_tensor(self.ctx, value, name)
            dtype = converters.DTYPES[node.meta["val"].dtype]
            layer = self.ctx.net.add_identity(tensor) if tensor.dtype == dtype else self.ctx.net.add_cast(tensor, dtype)
            layer.get_output(0).name = name
            self.ctx.net.mark_output(layer.get_output(0))
        return args[0]


__all__ = ["LIBRARY", "NAME", "lowered", "refusals", "write"]
