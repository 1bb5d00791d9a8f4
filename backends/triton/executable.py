"""Running a lowered program on a GPU: PyTorch strings the calls together, kernels come from the artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.backends.triton import ops, store
from graphwright.backends.triton.driver import Binaries
from graphwright.contract import Contract
from graphwright.errors import BackendError, TargetError
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import ALIGNMENT
from graphwright.target import Target, local_gpu


def require_gpu(target: str) -> None:
    """Refuses to run where the target is not the GPU at hand.

    Raises:
        TargetError: saying which GPU there is.
    """
    found = local_gpu()
    if found == target:
        return
    if found is None:
        raise TargetError(
            f"The program is compiled for {target}, and this machine has no GPU that PyTorch can use",
            fix="Save the artifact, copy it to a machine with that GPU and a GPU build of PyTorch, and load it there",
        )
    raise TargetError(
        f"The program is compiled for {target}, and this machine's GPU is {found}",
        fix=f"Compile it for {found}, or add {found} to the artifact's targets",
    )


class TritonExecutable:
    """A lowered program; it moves to the GPU at the first call."""

    def __init__(self, module: fx.GraphModule, contract: Contract, target: str, directory: Path) -> None:
        self._module = module
        self._contract = contract
        self._target = target
        self._directory = directory
        self._binaries: Binaries | None = None

    @property
    def device(self) -> torch.device:
        """Where state has to lie."""
        return torch.device("cuda") if local_gpu() == self._target else torch.device("cpu")

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs it once; inputs may lie on the CPU and the outputs then do, state must lie on the GPU.

        Raises:
            TargetError: the GPU at hand is not the target.
            BackendError: state on the CPU, or not contiguous.
        """
        place = tensors[self._contract.names[0]].device
        return tuple(output.to(place) for output in self.resident(tensors))

    def resident(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs it once, and leaves the outputs on the GPU.

        Raises:
            TargetError: the GPU at hand is not the target.
            BackendError: state on the CPU, or not contiguous.
        """
        require_gpu(self._target)
        binaries = self._start()
        for spec in self._contract.state:
            state = tensors[spec.name]
            if not state.is_cuda:
                raise BackendError(f"State {spec.name} lies on {state.device}", fix="Allocate it on the GPU")
            if not state.is_contiguous():
                raise BackendError(f"State {spec.name} is not contiguous, so it cannot be written in place")
        moved = (tensors[name].to(self.device, non_blocking=True) for name in self._contract.names)
        with torch.no_grad(), ops.using(binaries):
            outputs: tuple[Tensor, ...] = self._module(*moved)
        return outputs

    def sample(
        self, logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> Tensor:
        """`graphwright.ops.sample_tokens` where the logits lie; tokens int64 [B] on the CPU.

        Raises:
            ArtifactError: the program was compiled without caches, so nothing to choose tokens with came with it.
        """
        rows, place = logits.contiguous(), uniform.to(logits.device, non_blocking=True)
        if rows.data_ptr() % ALIGNMENT:
            # The last token's among those of a whole prompt.
            rows = rows.clone()
        with torch.no_grad(), ops.using(self._start()):
            tokens: Tensor = ops.sample_tokens.target(rows, place, temperature, top_k, top_p, min_p)
        return tokens.cpu()

    def _start(self) -> Binaries:
        if self._binaries is None:
            to_device(self._module, self.device)
            entries = store.read(self._directory, self._target)
            self._binaries = Binaries(Device.of(Target.parse(self._target)), entries)
        return self._binaries


def to_device(module: fx.GraphModule, device: torch.device) -> None:
    """Moves weights, and everything that the graph makes on the CPU because it was captured there."""
    module.to(device)
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        node.args = _moved(node.args, device)
        node.kwargs = _moved(node.kwargs, device)
        if _makes_tensors(node) and node.kwargs.get("device") is None:
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()


def _moved(arguments: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map(lambda value: device if isinstance(value, torch.device) else value, arguments)


def _makes_tensors(node: fx.Node) -> bool:
    """Whether a call makes a tensor out of numbers, on the device that it names."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or any("Tensor" in str(argument.type) for argument in schema.arguments):
        return False
    return any(argument.name == "device" for argument in schema.arguments)
