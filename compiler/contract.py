"""The contract of a program: what goes in, in which shapes, and what comes out.

    contract = Contract(
        inputs=(InputSpec("input_ids", torch.int64, ("batch", "sequence"), role="token", high=49152),),
        outputs=("logits",),
        dims=(Dim("batch", 1, 64), Dim("sequence", 1, 2048)),
    )
    tensors = contract.draw({"batch": 2, "sequence": 7}, seed=0)

A dimension named in two shapes is the same size in both. Everything that makes sample inputs (verification,
calibration without data, tests) draws them here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from graphwright.errors import GraphwrightError

Role = Literal[
    "token", "attention_mask", "position", "key_position", "logit_index", "slot", "tree_mask", "block_table", "tensor"
]
Shape = tuple[int | str, ...]

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` → `"float32"`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Dim:
    """A symbolic dimension and the sizes it may take, both ends included.

    A dimension `of` another one has a place for every `per` of that one's: its size is their quotient, rounded up.
    """

    name: str
    min: int = 1
    max: int = 1 << 20
    of: str = ""
    per: int = 1


@dataclass(frozen=True)
class InputSpec:
    """One input tensor.

    `role` says what the values mean: `token` ids below `high`; an `attention_mask` of ones and zeros; a
    `position` of each new token in its own sequence, -1 for padding; a `key_position`, the slots of the cache in
    use; a `logit_index`, the places in the sequence whose logits are wanted; a `slot`, the place of each new token in
    the caches; a `tree_mask`, what is added to scores so that guesses do not see each other; a `block_table` of the
    blocks, with `high` slots each, in which the slots of every row lie; or any other `tensor`. Positions are below
    `high` if it is not 0.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    role: Role = "tensor"
    high: int = 0


@dataclass(frozen=True)
class StateSpec:
    """One tensor that the program reads and writes in place between calls, such as a key cache."""

    name: str
    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Contract:
    """Inputs in call order, state, output names, and the ranges of the symbolic dimensions."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    dims: tuple[Dim, ...] = ()
    state: tuple[StateSpec, ...] = ()

    def dim(self, name: str) -> Dim:
        """The dimension called `name`; KeyError when there is none."""
        for dim in self.dims:
            if dim.name == name:
                return dim
        raise KeyError(name)

    def input(self, role: Role) -> InputSpec | None:
        """The first input with this role, or None."""
        return next((spec for spec in self.inputs if spec.role == role), None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all placeholders in call order: inputs first, then state."""
        return (*(spec.name for spec in self.inputs), *(spec.name for spec in self.state))

    def sizes(self, wanted: Mapping[str, int] | None = None) -> dict[str, int]:
        """A size for every dimension: as wanted, else small and odd, clamped to its range."""
        defaults = {"batch": 2, "sequence": 7, "keys": 11, "capacity": 16, "logits": 2, "table": 11, "blocks": 23}
        asked = {**defaults, **(wanted or {})}
        return self._derived({d.name: max(d.min, min(asked.get(d.name, 5), d.max)) for d in self.dims})

    def draw(self, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs of the given sizes, the same for the same seed.

        An attention mask is drawn with right padding, and its first row is full.
        """
        concrete = self.sizes(sizes)
        generator = torch.Generator().manual_seed(seed)
        return {spec.name: _draw(spec, resolve(spec.shape, concrete), generator) for spec in self.inputs}

    def allocate(self, sizes: Mapping[str, int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Zeroed state tensors of the given sizes."""
        concrete = self._derived({dim.name: sizes.get(dim.name, dim.min) for dim in self.dims})
        return {s.name: torch.zeros(resolve(s.shape, concrete), dtype=s.dtype, device=device) for s in self.state}

    def _derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """The same sizes, with those of dimensions of others computed."""
        return {**sizes, **{dim.name: -(-sizes[dim.of] // dim.per) for dim in self.dims if dim.of}}

    def check(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Checks names, dtypes and shapes of `tensors`; returns the size of every dimension.

        Raises:
            GraphwrightError: naming the input, what was expected and what was found.
        """
        sizes: dict[str, int] = {}
        for spec in (*self.inputs, *self.state):
            if spec.name not in tensors:
                raise GraphwrightError(f"Input {spec.name} is missing; the program takes {', '.join(self.names)}")
            self._check_one(spec, tensors[spec.name], sizes)
        return sizes

    def _check_one(self, spec: InputSpec | StateSpec, tensor: Tensor, sizes: dict[str, int]) -> None:
        expected = f"{dtype_name(spec.dtype)}{list(spec.shape)}"
        found = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        mismatch = GraphwrightError(f"Input {spec.name} should be {expected} and is {found}")
        if tensor.dtype != spec.dtype or tensor.dim() != len(spec.shape):
            raise mismatch
        for want, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(want, int):
                if want != size:
                    raise mismatch
                continue
            dim = self.dim(want)
            if sizes.setdefault(want, size) != size:
                raise GraphwrightError(
                    f"Dimension {want} is {sizes[want]} in an earlier input and {size} in {spec.name}"
                )
            if not dim.min <= size <= dim.max:
                raise GraphwrightError(
                    f"Dimension {want} of input {spec.name} is {size}; the program takes {dim.min} to {dim.max}"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `from_json` is its inverse."""
        return {
            "inputs": [{**vars(s), "dtype": dtype_name(s.dtype), "shape": list(s.shape)} for s in self.inputs],
            "state": [{**vars(s), "dtype": dtype_name(s.dtype), "shape": list(s.shape)} for s in self.state],
            "outputs": list(self.outputs),
            "dims": [vars(dim) for dim in self.dims],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Contract":
        """Rebuilds a contract from `to_json`."""

        def fields(entry: Mapping[str, Any]) -> dict[str, Any]:
            return {**entry, "dtype": DTYPES[entry["dtype"]], "shape": tuple(entry["shape"])}

        return Contract(
            inputs=tuple(InputSpec(**fields(entry)) for entry in data["inputs"]),
            state=tuple(StateSpec(**fields(entry)) for entry in data["state"]),
            outputs=tuple(data["outputs"]),
            dims=tuple(Dim(**entry) for entry in data["dims"]),
        )

    def with_(self, **changes: Any) -> "Contract":
        """A copy with some fields replaced."""
        return replace(self, **changes)


def resolve(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Puts sizes in for the names of a shape; `"capacity+1"` is the size of capacity plus one."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in shape)


def _draw(spec: InputSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if spec.role == "attention_mask":
        lengths = torch.randint(1, shape[-1] + 1, (shape[0], 1), generator=generator)
        lengths[0] = shape[-1]
        return (torch.arange(shape[-1])[None, :] < lengths).to(spec.dtype)
    if spec.role == "tree_mask":
        return torch.zeros(shape, dtype=spec.dtype)
    if spec.role in ("position", "slot"):
        return torch.arange(shape[-1]).expand(shape).to(spec.dtype).contiguous()
    if spec.role == "key_position":
        return torch.arange(shape[-1]).to(spec.dtype)
    if spec.role == "logit_index":
        return torch.arange(shape[-1]).expand(shape).to(spec.dtype).contiguous()
    if spec.role == "block_table":
        return torch.arange(shape[0] * shape[1]).reshape(shape).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not spec.dtype.is_floating_point:
        return torch.randint(0, spec.high or 2, shape, generator=generator).to(spec.dtype)
    return torch.randn(shape, generator=generator).to(spec.dtype)
