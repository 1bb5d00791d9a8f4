"""Running an engine on a GPU: PyTorch owns the device memory, TensorRT reads and writes it by address."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.onnx.naming import tensor_name
from graphwright.contract import Contract
from graphwright.errors import BackendError, TargetError
from graphwright.ops import kv_cache_update
from graphwright.target import Target, local_gpu

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


def require_gpu(target: Target) -> None:
    """Refuses to run where the target is not the GPU at hand.

    Raises:
        TargetError: saying which GPU there is.
    """
    found = local_gpu()
    if found == target.gpu:
        return
    if found is None:
        raise TargetError(
            f"The engine is built for {target.arch}, and this machine has no GPU that PyTorch can use",
            fix="Save the artifact, copy it to a machine with that GPU and a GPU build of PyTorch, and load it there",
        )
    raise TargetError(
        f"The engine is built for {target.arch}, and this machine's GPU is {found}",
        fix="Compile it for that GPU",
    )


def choose_profile(profiles: Sequence[Mapping[str, Sequence[int]]], sizes: Mapping[str, int]) -> int:
    """The first profile whose ranges hold all sizes.

    Raises:
        BackendError: none does; the sizes that stand out are named.
    """
    outside: list[str] = []
    for index, profile in enumerate(profiles):
        wrong = [n for n, (low, _, high) in profile.items() if n in sizes and not low <= sizes[n] <= high]
        if not wrong:
            return index
        outside = [f"{name} is {sizes[name]} and may be {profile[name][0]} to {profile[name][2]}" for name in wrong]
    raise BackendError(f"No profile of the engine has these sizes: {', '.join(outside)}", fix="Feed fewer at once")


class TensorrtExecutable:
    """An engine as a program; it is loaded at the first call."""

    def __init__(self, contract: Contract, target: Target, engine: Path, facts: Mapping[str, Any]) -> None:
        self._contract = contract
        self._target = target
        self._engine = engine
        self._facts = facts
        self._context: Any = None
        self._loaded: Any = None

    @property
    def device(self) -> torch.device:
        """Where state has to lie."""
        return torch.device("cuda") if local_gpu() == self._target.gpu else torch.device("cpu")

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs it once; inputs may lie on the CPU and the outputs then do, state must lie on the GPU.

        Raises:
            TargetError: the GPU at hand is not the target.
            BackendError: state on the CPU, sizes outside of every profile, or TensorRT fails.
        """
        require_gpu(self._target)
        sizes = self._contract.check(tensors)
        for spec in self._contract.state:
            if not tensors[spec.name].is_cuda or not tensors[spec.name].is_contiguous():
                raise BackendError(f"State {spec.name} does not lie whole on the GPU", fix="Allocate it there")
        place = tensors[self._contract.names[0]].device
        made = self._run(tensors, choose_profile(self._facts["profiles"], sizes))
        for spec in self._contract.state:
            if f"{spec.name}.new" in made:
                kv_cache_update(tensors[spec.name], made[f"{spec.name}.new"], made[f"{spec.name}.slots"])
        return tuple(made[tensor_name(name)].to(place) for name in self._contract.outputs)

    def _run(self, tensors: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        context, stream = self._start(), torch.cuda.current_stream()
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        held = {}  # inputs must outlive the launch
        for spec in (*self._contract.inputs, *self._contract.state):
            name = tensor_name(spec.name)
            held[name] = tensors[spec.name].to(self.device).contiguous()
            context.set_input_shape(name, tuple(held[name].shape))
            context.set_tensor_address(name, held[name].data_ptr())
        made = {}
        for entry in self._facts["outputs"]:
            shape = tuple(context.get_tensor_shape(entry["name"]))
            made[entry["name"]] = torch.empty(shape, dtype=DTYPES[entry["dtype"]], device=self.device)
            context.set_tensor_address(entry["name"], made[entry["name"]].data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise BackendError("TensorRT could not run the engine", where=str(self._engine))
        stream.synchronize()
        return made

    def _start(self) -> Any:
        if self._context is None:
            import tensorrt_rtx as trt

            runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._loaded = (runtime, runtime.deserialize_cuda_engine(self._engine.read_bytes()))
            if self._loaded[1] is None:
                raise BackendError("TensorRT does not load the engine on this machine", where=str(self._engine))
            self._context = self._loaded[1].create_execution_context()
        return self._context
