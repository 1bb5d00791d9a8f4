"""What every executable does with its arguments before its kernels see them, which check nothing themselves."""

from collections.abc import Mapping

from torch import Tensor

from graphwright.contract import Contract
from graphwright.errors import BackendError


class Arguments:
    """Puts tensors in the order of a contract, contiguous, and checks what would let kernels read past a cache."""

    def __init__(self, contract: Contract) -> None:
        self._names = contract.names
        self._state = {spec.name for spec in contract.state}
        self._tokens = [spec.name for spec in contract.inputs if spec.role in ("token", "logit_index")]
        self._keys = next((spec.name for spec in contract.inputs if spec.role == "key_position"), "")
        # Caches grow together, so one of them speaks for all.
        self._growing = [(s.name, s.shape.index("capacity")) for s in contract.state if "capacity" in s.shape][:1]

    def __call__(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors in order; inputs may be copied, state is written in place and never is.

        Raises:
            BackendError: state that is not contiguous, or a cache with fewer slots than keys are asked for.
        """
        for name, axis in self._growing:
            capacity, keys = tensors[name].shape[axis] - 1, tensors[self._keys].numel()
            if keys > capacity:
                raise BackendError(
                    f"{self._keys} asks for {keys} slots and the caches hold {capacity} besides the scratch slot",
                    fix="Allocate caches with a larger capacity",
                )
        return [self._contiguous(name, tensors[name]) for name in self._names]

    def _contiguous(self, name: str, value: Tensor) -> Tensor:
        if value.is_contiguous():
            return value
        if name in self._state:
            raise BackendError(f"State {name} is not contiguous, so it cannot be written in place")
        return value.contiguous()

    def one_token(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the call is a decode step of a single sequence."""
        return all(tensors[name].numel() == 1 for name in self._tokens)
