"""Engines through torch_tensorrt.dynamo: a part as its converters want it, what has none, and its engine.

    builder = TorchBuilder(target)
    model, refusals = builder.prepare(part, folder)     # {node: reason}; empty if everything has a converter
    engine = builder.build(model, part, profiles, "sm_89", progress)

The program is handed over in the form of `handover`. With `torch-tensorrt-rtx`, engines are those of TensorRT for RTX:
for any GPU, on a machine with or without one. `torch-tensorrt` builds with TensorRT, for the GPU at hand alone.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.backend import Progress, Support
from graphwright.backends.tensorrt.builder import some
from graphwright.backends.tensorrt.engine import Engine, Sizes, serialize
from graphwright.backends.tensorrt.handover import DECOMPOSED, FORMS, Handover
from graphwright.backends.tensorrt.jit import torch_tensorrt
from graphwright.backends.tensorrt.no_gpu import questions_answered
from graphwright.backends.tensorrt.takes import FORMATS
from graphwright.errors import BackendError, TargetError
from graphwright.match import argument
from graphwright.op import op_of
from graphwright.partition import Part
from graphwright.target import Target, local_gpu
from graphwright.text import op_name

ALONE = (
    "Or install graphwright[tensorrt] into an environment without torch_tensorrt: TensorRT for RTX alone builds for "
    "any GPU on any machine"
)

SAMPLED = {"logits": 3}
"""Sizes that parts are exported with, besides those that contracts draw; no two are equal, and none is one."""


@dataclass(frozen=True)
class Model:
    """What an engine is built from: the lowered program, and the names of what it returns."""

    module: fx.GraphModule
    outputs: tuple[str, ...]


def require_target(target: Target | None) -> None:
    """Refuses what the installed distribution of torch_tensorrt cannot build, without importing it.

    Raises:
        BackendError: PyTorch is a build without CUDA, whose libraries torch_tensorrt loads.
        TargetError: it builds for the GPU at hand alone, and the target is another.
    """
    if torch.version.cuda is None:
        raise BackendError(
            f"torch_tensorrt is installed, and builds engines with a CUDA build of PyTorch only; torch "
            f"{torch.__version__} is none",
            fix=f"Install a CUDA build of torch {torch.__version__.partition('+')[0]}. {ALONE}",
        )
    if target is None or builds_for_any_gpu() or target.gpu == local_gpu():
        return
    here = local_gpu()
    raise TargetError(
        f"torch-tensorrt builds engines with TensorRT, on the GPU that they run on: {target.arch} is asked for, and "
        + (f"this machine's GPU is {here}" if here else "this machine has no GPU that PyTorch can use"),
        fix=f"Install torch-tensorrt-rtx instead of torch-tensorrt, or compile on that GPU. {ALONE}",
    )


def builds_for_any_gpu() -> bool:
    """Whether torch_tensorrt is the distribution over TensorRT for RTX."""
    try:
        importlib.metadata.distribution("torch-tensorrt-rtx")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class TorchBuilder:
    """Has torch_tensorrt's converters and ours write parts as networks.

    Args:
        target: the GPU to build for.

    Raises:
        BackendError: torch_tensorrt cannot be imported.
    """

    def __init__(self, target: Target) -> None:
        self._arch = target.arch
        with questions_answered(self._arch):
            torch_tensorrt(ALONE)
            from graphwright.backends.tensorrt import network
        self._network = network
        self.name = network.NAME

    def supports(self, node: fx.Node) -> Support:
        """Whether a node may have a form in an engine: of ATen's operators, only the lowered program shows it."""
        reason = _refusal(node)
        return Support(not reason, reason)

    def prepare(self, part: Part, folder: Path) -> tuple[Model, dict[str, str]]:
        """The part as torch_tensorrt lowers it, and the nodes of which something has no converter, with the reasons.

        Raises:
            BackendError: torch.export or torch_tensorrt does not take the part, or what has no converter is no node.
        """
        handed = Handover(part.program, torch.device("cpu"))
        tensors, ranges = samples(part)
        with questions_answered(self._arch):
            try:
                module = self._network.lowered(handed.exported(tensors, ranges))
            except Exception as error:
                # Export and lowering raise whatever comes; a fallback would hide which builder made the engine.
                raise BackendError(
                    f"A part of the program cannot be handed to torch_tensorrt: {error}", fix=ALONE
                ) from error
            found = self._network.refusals(module)
        known = {name: reason for name, reason in found.items() if name in part.nodes}
        if found and not known:
            raise BackendError(f"torch_tensorrt does not take a part of the program: {some(found)}", fix=ALONE)
        return Model(module, handed.outputs), known

    def build(
        self, model: Model, part: Part, profiles: Sequence[dict[str, Sizes]], arch: str, progress: Progress
    ) -> Engine:
        """The engine of a lowered part.

        Raises:
            BackendError: a converter fails, or TensorRT does not build the network; says which node.
        """
        progress("convert for TensorRT", 0.1)
        with questions_answered(self._arch):
            draft, held = self._network.write(model.module, part.program.contract, model.outputs)
            engine = serialize(draft, profiles, arch, self.name, progress)
        del held  # the weights' memory, which the builder has read now
        return engine


def samples(part: Part) -> tuple[list[Tensor], dict[str, Sizes]]:
    """Inputs and state that a part is exported with, and the range of every dimension that is free."""
    contract = part.program.contract
    sizes = contract.sizes(SAMPLED)
    for name, size in part.sizes.items():
        sizes[name] = int(size.subs({symbol: sizes[str(symbol)] for symbol in size.free_symbols}))
    tensors = [*contract.draw(sizes).values(), *contract.allocate(sizes).values()]
    return tensors, {dim.name: (dim.min, sizes[dim.name], dim.max) for dim in contract.dims if dim.min < dim.max}


def _refusal(node: fx.Node) -> str:
    """Why a node has no form in an engine, as far as it alone shows; empty if it may have one."""
    if node.target is ops.kv_cache_update.target:
        return "" if node.args[0].op == "placeholder" else "it writes into a part of a cache"
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return f"TensorRT has no form of {op_name(node.target)}, which writes into its arguments"
    op = op_of(node.target)
    if op is None or op.name in DECOMPOSED:
        return ""
    if node.target not in FORMS:
        return f"TensorRT has no form of {op.name}"
    if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
        format = str(argument(node, "format"))
        return "" if format in FORMATS else f"TensorRT has no weights of format {format}"
    return ""


__all__ = ["Model", "TorchBuilder", "builds_for_any_gpu", "require_target", "samples"]
