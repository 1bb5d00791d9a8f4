"""Starting compiled kernels through the GPU's own driver: no compiler and no Triton are needed for it.

`libcuda.so.1` and `libamdhip64.so` offer the same calls under different names. A kernel's parameters are its run-time
arguments in order, and two pointers to scratch memory that Triton appends and that kernels here never use.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.triton.store import Entry
from graphwright.errors import ArtifactError, BackendError
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import ALIGNMENT, Config, Launch, Problem

LIBRARIES = {"cuda": ("libcuda.so.1",), "rocm": ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")}
CALLS = {
    "cuda": ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel", "cuGetErrorString"),
    "rocm": (
        "hipModuleLoadData", "hipModuleGetFunction", "hipFuncSetAttribute", "hipModuleLaunchKernel",
        "hipDrvGetErrorString",
    ),
}  # fmt: skip
DYNAMIC_SHARED = 8
"""The attribute that lets a kernel have more shared memory than the 48 KiB which every kernel may have."""

STATIC_SHARED = 48 * 1024
CTYPES = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


class Driver:
    """The few driver calls that launching takes."""

    def __init__(self, kind: str, library: str | None = None) -> None:
        self._kind = kind
        names = (library,) if library else LIBRARIES[kind]
        found = None
        for name in names:
            try:
                found = ctypes.CDLL(name)
                break
            except OSError:
                continue
        if found is None:
            raise BackendError(f"The GPU driver library {names[0]} cannot be loaded", fix="Install the GPU's driver")
        self._load, self._get, self._set, self._launch, self._text = (getattr(found, name) for name in CALLS[kind])

    def function(self, code: bytes, entry: Entry) -> Any:
        """The kernel in a binary, ready to launch."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._load(ctypes.byref(module), code), f"{entry.file} cannot be loaded")
        self._check(self._get(ctypes.byref(function), module, entry.name.encode()), f"{entry.file} has no {entry.name}")
        if entry.shared > STATIC_SHARED and self._kind == "cuda":
            done = self._set(function, ctypes.c_int(DYNAMIC_SHARED), ctypes.c_int(entry.shared))
            self._check(done, f"{entry.name} cannot have {entry.shared} bytes of shared memory")
        return function

    def launch(self, function: Any, grid: tuple[int, ...], threads: int, shared: int, stream: int, values: Any) -> None:
        """Starts a kernel on a stream; `values` are ctypes objects in the kernel's order."""
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = (*grid, 1, 1)[:3]
        done = self._launch(
            function, ctypes.c_uint(x), ctypes.c_uint(y), ctypes.c_uint(z), ctypes.c_uint(threads), ctypes.c_uint(1),
            ctypes.c_uint(1), ctypes.c_uint(shared), ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip
        self._check(done, "A kernel cannot be started")

    def _check(self, code: int, problem: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self._text(code, ctypes.byref(text))
            raise BackendError(f"{problem}: {(text.value or b'unknown error').decode()} ({code})")


class Binaries:
    """Runs launches with the binaries of an artifact; it never compiles."""

    def __init__(self, device: Device, entries: list[Entry], driver: Driver | None = None) -> None:
        self.device = device
        self._entries: Mapping[Problem, Entry] = {entry.problem: entry for entry in entries}
        self._driver = driver or Driver(device.target.kind)
        self._functions: dict[Problem, Any] = {}

    def __call__(self, launch: Launch) -> Config:
        """Starts the kernel on the current stream, and tells in which configuration.

        Raises:
            ArtifactError: no binary serves this launch.
            BackendError: a tensor that the kernel cannot read, or the driver refuses.
        """
        problem = launch.problem()
        entry = self._entries.get(problem)
        if entry is None:
            raise ArtifactError(
                f"The artifact has no binary of {problem.kernel} for these sizes on {self.device.name}",
                where=", ".join(f"{name}={value}" for name, value in problem.constants),
                fix="Compile the model again with this version",
            )
        grid = launch.grid(entry.config)
        if 0 in grid:
            return entry.config
        if problem not in self._functions:
            self._functions[problem] = self._driver.function(_read(entry.file), entry)
        values = [_value(name, kind, launch.arguments[name]) for name, kind in problem.types]
        threads = entry.config.num_warps * self.device.warp_size
        scratch = [ctypes.c_void_p(), ctypes.c_void_p()]
        self._driver.launch(self._functions[problem], grid, threads, entry.shared, _stream(), [*values, *scratch])
        return entry.config


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"Kernel {file} cannot be read: {error.strerror}", fix="Copy the artifact again") from error


def _value(name: str, kind: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return CTYPES[kind](value)
    pointer = value.data_ptr()
    if pointer % ALIGNMENT:
        raise BackendError(
            f"Tensor {name.removesuffix('_ptr')} starts at an address that is no multiple of {ALIGNMENT} bytes",
            fix="Pass a copy of it: x.clone()",
        )
    return ctypes.c_void_p(pointer)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_available() else 0
