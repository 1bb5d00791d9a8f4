"""Runs a compiled library with TVM's virtual machine: one call per forward, weights and state shared with torch."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import tvm_ffi
from torch import Tensor

from graphwright.backends.tvm import threads
from graphwright.backends.tvm.expert_store import FETCH, ExpertStore, open_store
from graphwright.calling import Arguments
from graphwright.contract import Contract
from graphwright.errors import ArtifactError, BackendError
from graphwright.program import CACHE_LINE

_package = importlib.util.find_spec("tvm")
if _package is None or _package.origin is None:
    raise ModuleNotFoundError("No module named 'tvm'", name="tvm")
LIBRARIES = Path(_package.origin).parent / "lib"

CPU, POOLED = 1, 2
"""DLPack's number of the device, and the virtual machine's of its allocator."""


class TvmExecutable:
    """A loaded library with its weights; may be called again and again, from one thread at a time."""

    def __init__(
        self,
        file: Path,
        forms: tuple[str, ...],
        contract: Contract,
        weights: Mapping[str, Tensor],
        plan: Mapping[str, Any] | None = None,
        mapped: bool = False,
    ) -> None:
        """Loads a library.

        Args:
            file: the library.
            forms: its functions.
            contract: of the program.
            weights: by name, in order of use.
            plan: which experts are fetched, or None.
            mapped: whether weights are mapped from a file, so that experts can be left there.
        """
        _load_runtime()
        weights = {name: _aligned(weight) for name, weight in weights.items()}
        self.experts = open_store(plan, weights) if plan is not None and mapped else None
        for layer in range(len(plan["layers"]) if plan is not None else 0):
            # A virtual machine looks these functions up when it is made, so each has those of its own store.
            tvm_ffi.register_global_func(f"{FETCH}.{layer}", _fetcher(self.experts, layer), override=True)
        try:
            machine = _virtual_machine(file)
        except RuntimeError as error:
            raise ArtifactError(f"Compiled library {file} cannot be loaded: {error}") from error
        self._forms = {form: machine[form] for form in forms}
        self._arguments = Arguments(contract)
        self._state = [spec.name for spec in contract.state]
        self._weights = tvm_ffi.Array([tvm_ffi.from_dlpack(weight) for weight in weights.values()])

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs the form that fits the shapes of the inputs; state is written in place.

        Raises:
            BackendError: state that is not contiguous or not aligned, or a cache with fewer slots than keys are asked
                for.
        """
        for name in self._state:
            if tensors[name].data_ptr() % CACHE_LINE:
                raise BackendError(
                    f"State {name} does not start at a multiple of {CACHE_LINE} bytes, and kernels write it in place",
                    fix="Allocate it as a tensor of its own, as `contract.allocate` does",
                )
        arguments = [_aligned(argument) for argument in self._arguments(tensors)]
        threads.follow_torch()
        one = "decode" in self._forms and self._arguments.one_token(tensors)
        outputs = self._forms["decode" if one else "general"](*arguments, self._weights)
        return tuple(torch.from_dlpack(output) for output in outputs)


@functools.cache
def _load_runtime() -> None:
    """Loads TVM's runtime as `import tvm` would, without the compiler; libraries that come later find its symbols."""
    tvm_ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[LIBRARIES])


def _virtual_machine(file: Path) -> tvm_ffi.Module:
    """The functions of a library, over a pooled allocator of the CPU."""
    machine = tvm_ffi.load_module(str(file))["vm_load_executable"]()
    machine["vm_initialization"](CPU, 0, POOLED)
    return machine


def _fetcher(store: ExpertStore | None, layer: int) -> Callable[..., None]:
    """What a library calls before the experts of a layer; nothing where all of them are in memory anyway."""

    def fetch(indices: Any, guess: Any = None) -> None:
        if store is not None:
            likely = () if guess is None else torch.from_dlpack(guess).unique().tolist()
            store.fetch(layer, torch.from_dlpack(indices).unique().tolist(), likely)

    return fetch


def _aligned(tensor: Tensor) -> Tensor:
    """A contiguous tensor where TVM's own operators may load it: they take for granted that it starts a cache line.

    Weights that are mapped from a file may not; vectors that cross lines are slow in other kernels too.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else tensor.clone()
