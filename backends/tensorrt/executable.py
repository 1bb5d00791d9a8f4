"""Running an engine on a GPU: PyTorch owns the device memory, TensorRT reads and writes it by address."""

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from graphwright.backends.onnx.naming import tensor_name
from graphwright.backends.tensorrt.engine import RTX, Maker
from graphwright.contract import Contract
from graphwright.errors import BackendError, TargetError
from graphwright.ops import kv_cache_update
from graphwright.program import Program
from graphwright.target import Target, local_gpu

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}

UNNAMED = Maker("TensorRT's ONNX parser", RTX, "of another version")
"""Who made the engines of artifacts that were written when there was but one way, and do not say so."""


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


def maker(plan: Mapping[str, Any]) -> Maker:
    """Who made the engines of a plan, all of which are made in one go."""
    return Maker(**plan["maker"]) if "maker" in plan else UNNAMED


def require_library(plan: Mapping[str, Any]) -> None:
    """Refuses to load engines without the library that built them.

    Raises:
        BackendError: says which, and what to install.
    """
    made = maker(plan)
    if importlib.util.find_spec(made.library) is None:
        extra = "tensorrt" if made.library == RTX else "torch-tensorrt"
        raise BackendError(
            f"The engines were built by {made}, and the package {made.library} is not installed",
            fix=f"pip install 'graphwright[{extra}]'",
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


class Runner(Protocol):
    """One part, loaded."""

    def __call__(self, values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        """The part's outputs by name; state among `values` is written in place."""
        ...


def run_parts(runners: Sequence[Runner], values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
    """Everything that inputs, state and the parts one after the other make, by name."""
    known = dict(values)
    for run in runners:
        known |= run(known, profile)
    return known


class TorchPart:
    """A part that TensorRT does not take: a graph of PyTorch's operators."""

    def __init__(self, file: Path, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._program = Program.from_json(json.loads(file.read_text()), weights)
        self._program.module.to(device)

    def __call__(self, values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        """Runs the graph; the profile is of no matter."""
        contract = self._program.contract
        made = self._program(**{name: values[name] for name in contract.names})
        return dict(zip(contract.outputs, made, strict=True))


class EnginePart:
    """An engine; its state is read where it lies, and what is new of it is written there after the run."""

    def __init__(self, entry: Mapping[str, Any], made: Maker, file: Path, device: torch.device) -> None:
        self._contract = Contract.from_json(entry["contract"])
        self._entry, self._made, self._file, self._device = entry, made, file, device
        self._context: Any = None
        self._loaded: Any = None

    def __call__(self, values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        """Runs the engine on the current stream and waits for it.

        Raises:
            BackendError: TensorRT does not load or run the engine.
        """
        context, stream = self._start(), torch.cuda.current_stream()
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        held = {name: values[name].contiguous() for name in self._contract.names}  # outlives the launch
        for name, tensor in held.items():
            context.set_input_shape(tensor_name(name), tuple(tensor.shape))
            context.set_tensor_address(tensor_name(name), tensor.data_ptr())
        made = {}
        for entry in self._entry["outputs"]:
            shape = tuple(context.get_tensor_shape(entry["name"]))
            made[entry["name"]] = torch.empty(shape, dtype=DTYPES[entry["dtype"]], device=self._device)
            context.set_tensor_address(entry["name"], made[entry["name"]].data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise BackendError("TensorRT could not run the engine", where=str(self._file))
        stream.synchronize()
        return part_outputs(self._contract, values, made)

    def _start(self) -> Any:
        if self._context is None:
            made = self._made
            trt = importlib.import_module(made.library)
            runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._loaded = (runtime, runtime.deserialize_cuda_engine(self._file.read_bytes()))
            if self._loaded[1] is None:
                raise BackendError(
                    f"{made.library} {trt.__version__} does not load the engine, which was built by {made}",
                    where=str(self._file),
                    fix=f"Install {made.library} {made.library_version}, or compile the model again with what is here",
                )
            self._context = self._loaded[1].create_execution_context()
        return self._context


def part_outputs(contract: Contract, values: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a part by the contract's names, after its state has taken what is new of it."""
    for spec in contract.state:
        if f"{spec.name}.new" in made:
            kv_cache_update(values[spec.name], made[f"{spec.name}.new"], made[f"{spec.name}.slots"])
    return {name: made[tensor_name(name)] for name in contract.outputs}


class TensorrtExecutable:
    """The parts of a program; engines are loaded at the first call."""

    def __init__(
        self,
        contract: Contract,
        target: Target,
        plan: Mapping[str, Any],
        directory: Path,
        weights: Mapping[str, Tensor],
    ) -> None:
        self._contract, self._target = contract, target
        self._plan, self._directory, self._weights = plan, directory, weights
        self._runners: list[Runner] = []

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
        profiles = next(part["profiles"] for part in self._plan["parts"] if part["kind"] == "engine")
        given = {name: tensors[name].to(self.device) for name in self._contract.names}
        made = run_parts(self._loaded(), given, choose_profile(profiles, sizes))
        return tuple(made[name].to(place) for name in self._contract.outputs)

    def _loaded(self) -> list[Runner]:
        if not self._runners:
            self._runners = [self._load(entry) for entry in self._plan["parts"]]
            self._weights = {}  # those that are needed lie on the GPU now
        return self._runners

    def _load(self, entry: Mapping[str, Any]) -> Runner:
        file = self._directory / entry["file"]
        if entry["kind"] == "torch":
            return TorchPart(file, self._weights, self.device)
        return EnginePart(entry, maker(self._plan), file, self.device)
