"""A launch: everything about one kernel call except which of its configurations runs it.

A kernel's function makes launches from the shapes and dtypes of tensors alone, so meta tensors do as well as real
ones. The part that decides the machine code is the launch's `Problem`: two launches with equal problems share a
binary, and that is how a program's calls find what was compiled for them ahead of time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.device import Device

ALIGNMENT = 16
"""Bytes. Kernels are compiled for pointers, strides and widths that are multiples, so that loads are vectors."""

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
"""What Triton calls a pointer to each dtype."""


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel into blocks.

    Attributes:
        constants: tile sizes by the name of the kernel's parameter.
        num_warps: warps of a block.
        num_stages: depth of the software pipeline over the inner loop.
    """

    constants: tuple[tuple[str, int], ...] = ()
    num_warps: int = 4
    num_stages: int = 1

    @staticmethod
    def of(num_warps: int = 4, num_stages: int = 1, **constants: int) -> "Config":
        """A configuration from keywords."""
        return Config(tuple(sorted(constants.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.constants)[name]

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{tiles} warps={self.num_warps} stages={self.num_stages}".strip()


@dataclass(frozen=True)
class Work:
    """What one block does, for the model of a kernel's time.

    Attributes:
        flops: operations on `unit`.
        bytes: moved to and from device memory, re-reads by other blocks included.
        unit: dtype whose peak rate applies.
        in_flight: bytes that are asked for before the first of them is needed; 0 for all of `bytes`.
    """

    flops: float
    bytes: float
    unit: str = "float32"
    in_flight: float = 0.0


@dataclass(frozen=True)
class Problem:
    """What decides a kernel's machine code, as plain data.

    Attributes:
        module: Python module of the kernel.
        kernel: name of the function in it.
        types: Triton's type by run-time parameter, in the kernel's order.
        aligned: run-time parameters that are multiples of 16.
        constants: values of the other parameters, tile sizes excepted.
        configs: the configurations that may run it.
        matrix: whether matrix instructions are expected.
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    configs: tuple[Config, ...]
    matrix: bool

    @property
    def key(self) -> str:
        """A short name that equal problems share, in every process."""
        text = json.dumps([self.module, self.kernel, self.types, self.aligned, self.constants, _plain(self.configs)])
        return f"{self.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _plain(configs: tuple[Config, ...]) -> list[Any]:
    return [[config.constants, config.num_warps, config.num_stages] for config in configs]


@dataclass(frozen=True)
class Launch:
    """One kernel call.

    Attributes:
        kernel: the `@triton.jit` function.
        arguments: tensors and numbers by parameter; an optional tensor that is absent is None.
        constants: compile-time parameters that follow from the problem.
        configs: configurations to choose from; they may depend on the device and the class of a shape, never on a size.
        grid: blocks along each axis for a configuration.
        work: what one block does under a configuration.
        matrix: whether the inner product is meant to run on matrix instructions.
        static: integer parameters that are fixed by the model, not by the batch, and may be known multiples of 16.
    """

    kernel: Any
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    configs: tuple[Config, ...]
    grid: Callable[[Config], tuple[int, ...]]
    work: Callable[[Config], Work]
    matrix: bool = False
    static: frozenset[str] = field(default=frozenset())

    def problem(self) -> Problem:
        """The part that decides the machine code."""
        types: list[tuple[str, str]] = []
        aligned: list[str] = []
        constants = dict(self.constants)
        tiles = {name for name, _ in self.configs[0].constants}
        for name in self.kernel.arg_names:
            if name in self.constants or name in tiles:
                continue
            value = self.arguments[name]
            if value is None:
                constants[name] = None
                continue
            types.append((name, _type_of(name, value)))
            if isinstance(value, Tensor) or (name in self.static and value % ALIGNMENT == 0):
                aligned.append(name)
        return Problem(
            self.kernel.fn.__module__,
            self.kernel.fn.__name__,
            tuple(types),
            tuple(aligned),
            tuple(sorted(constants.items())),
            self.configs,
            self.matrix,
        )


def _type_of(name: str, value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        if value.dtype not in POINTERS:
            raise BackendError(f"A Triton kernel takes no {value.dtype} tensor", where=f"parameter {name}")
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


class Runner(Protocol):
    """Does something with launches for one device."""

    device: Device

    def __call__(self, launch: Launch) -> Config:
        """Runs the launch, or notes it down; the configuration it runs in, which what follows may depend on."""
        ...


@dataclass
class JustInTime:
    """Runs launches through Triton: compiled on a GPU, interpreted where TRITON_INTERPRET=1 was set at import.

    Attributes:
        choose: picks the configuration of a launch that is seen for the first time.
    """

    device: Device
    choose: Callable[[Launch, Device], Config]
    chosen: dict[Problem, Config] = field(default_factory=dict)

    def __call__(self, launch: Launch) -> Config:
        """Runs the launch in the configuration chosen for its problem."""
        problem = launch.problem()
        if problem not in self.chosen:
            self.chosen[problem] = self.choose(launch, self.device)
        config = self.chosen[problem]
        launch.kernel[launch.grid(config)](
            **launch.arguments,
            **launch.constants,
            **dict(config.constants),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return config


@dataclass
class Recorder:
    """Notes launches down; with meta tensors it tells which kernels a call needs without running any."""

    device: Device
    launches: list[Launch] = field(default_factory=list)

    def __call__(self, launch: Launch) -> Config:
        """Keeps the launch; any configuration may be the one it will run in."""
        self.launches.append(launch)
        return launch.configs[0]


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """`x` as [rows, K] whose rows are dense and lie at one distance; copied where its strides do not allow it."""
    width = x.shape[-1]
    if x.stride(-1) != 1 and width > 1:
        return x.contiguous().view(-1, width)
    try:
        flat = x.view(-1, width)
    except RuntimeError:
        flat = x.contiguous().view(-1, width)
    return flat


def dense(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is dense and its strides keep vectors aligned, else a contiguous copy.

    Strides of dimensions of size one are never used, and may be anything.
    """
    used = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    vector = ALIGNMENT if x.shape[-1] % ALIGNMENT == 0 else 1
    if x.stride(-1) == 1 and all(stride % vector == 0 for stride in used):
        return x
    return x.contiguous()


def fixed(width: int, *names: str) -> frozenset[str]:
    """Strides known to be multiples of 16 because the width of what they step over is one; none otherwise.

    With other widths a stride may be a multiple for one batch and not for the next, and would ask for two binaries.
    """
    return frozenset(names) if width % ALIGNMENT == 0 else frozenset()


def strides(prefix: str, x: Tensor, names: str) -> dict[str, int]:
    """Strides of the leading dimensions of `x` as kernel arguments, `{prefix}_{letter}`; 0 where the size is one."""
    return {
        f"{prefix}_{letter}": 0 if size == 1 else stride
        for letter, size, stride in zip(names, x.shape, x.stride(), strict=False)
    }


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without storage, to ask for launches with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def check_device(**tensors: Tensor | None) -> None:
    """Refuses tensors on different devices.

    Raises:
        BackendError: naming the tensors and where they lie.
    """
    places = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise BackendError(f"A kernel needs all its tensors on one device: {found}", fix="Move them to one GPU")
