"""Runs a compiled library with TVM's virtual machine: one call per forward, weights and state shared with torch."""

from collections.abc import Mapping
from pathlib import Path

import torch
import tvm
import tvm_ffi
from torch import Tensor
from tvm import relax

from graphwright.backends.tvm import threads
from graphwright.contract import Contract
from graphwright.errors import ArtifactError, BackendError


class TvmExecutable:
    """A loaded library with its weights; may be called again and again, from one thread at a time."""

    def __init__(self, file: Path, forms: tuple[str, ...], contract: Contract, weights: Mapping[str, Tensor]) -> None:
        try:
            library = tvm.runtime.load_module(str(file))
        except RuntimeError as error:
            raise ArtifactError(f"Compiled library {file} cannot be loaded: {error}") from error
        machine = relax.VirtualMachine(library, tvm.cpu())
        self._forms = {form: machine[form] for form in forms}
        self._contract = contract
        self._weights = tvm_ffi.Array(
            [tvm_ffi.from_dlpack(weight.detach().contiguous()) for weight in weights.values()]
        )
        roles = ("token", "logit_index")
        self._single = [spec.name for spec in contract.inputs if spec.role in roles]
        self._state = {spec.name for spec in contract.state}
        self._keys = next((spec.name for spec in contract.inputs if spec.role == "key_position"), "")
        self._growing = [(s.name, s.shape.index("capacity")) for s in contract.state if "capacity" in s.shape][:1]

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs the form that fits the shapes of the inputs; state is written in place.

        Raises:
            BackendError: state that is not contiguous, or a cache with fewer slots than keys are asked for.
        """
        self._check_capacity(tensors)
        threads.follow_torch()
        arguments = [self._argument(name, tensors[name]) for name in self._contract.names]
        one = "decode" in self._forms and all(tensors[name].numel() == 1 for name in self._single)
        outputs = self._forms["decode" if one else "general"](*arguments, self._weights)
        return tuple(torch.from_dlpack(output) for output in outputs)

    def _argument(self, name: str, value: Tensor) -> Tensor:
        if value.is_contiguous():
            return value
        if name in self._state:
            raise BackendError(f"State {name} is not contiguous, so it cannot be written in place")
        return value.contiguous()

    def _check_capacity(self, tensors: Mapping[str, Tensor]) -> None:
        """The kernels read the first `keys` slots without asking whether a cache has them."""
        for name, axis in self._growing:
            capacity, keys = tensors[name].shape[axis] - 1, tensors[self._keys].numel()
            if keys > capacity:
                raise BackendError(
                    f"{self._keys} asks for {keys} slots and the caches hold {capacity} besides the scratch slot",
                    fix="Allocate caches with a larger capacity",
                )
