"""The machines a program can be compiled for: features, memory and peak rates, as one table.

    Target.parse("cpu")             the machine at hand
    Target.parse("cuda:sm_90")      a GPU by its architecture
    Target.parse("tensorrt:sm_89")  the same GPU, through TensorRT engines

Peak rates are the vendors' dense figures for one device and serve estimates only; for `cpu` they come from the
number of cores and the instruction set found here.
"""

import ctypes
import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from graphwright.errors import TargetError, nearest


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    Attributes:
        name: as the user writes it.
        kind: `cpu`, `cuda`, `rocm`, or `tensorrt` for NVIDIA GPUs through its engines.
        arch: `x86_64`, `aarch64`, `sm_90`, `gfx942` …
        features: instruction set extensions that matter to kernels.
        memory_bytes: device memory.
        bandwidth: bytes per second from device memory.
        flops: peak operations per second by dtype name.
        backends: the backends that lower for it unless the user names one: the first that lowers a whole program
            itself, else the last.
    """

    name: str
    kind: str
    arch: str
    features: tuple[str, ...] = ()
    memory_bytes: int = 0
    bandwidth: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    backends: tuple[str, ...] = ()

    @property
    def here(self) -> bool:
        """Whether programs for this target run on this machine."""
        return self.kind == "cpu" or self.gpu == local_gpu()

    @property
    def gpu(self) -> str:
        """The GPU as `local_gpu` names it, whatever compiles for it."""
        return f"cuda:{self.arch}" if self.kind == "tensorrt" else self.name

    @staticmethod
    def parse(text: str) -> "Target":
        """The target called `text`.

        Raises:
            TargetError: unknown, with the nearest known name.
        """
        if text == "cpu":
            return host()
        if text in GPUS:
            return GPUS[text]
        if text == "tensorrt" and f"tensorrt:{(local_gpu() or '').partition(':')[2]}" in GPUS:
            return GPUS[f"tensorrt:{(local_gpu() or '').partition(':')[2]}"]
        if text == "tensorrt":
            raise TargetError(
                "Target tensorrt is this machine's GPU, and there is none that TensorRT-RTX builds for",
                fix=f"Name the architecture: {', '.join(TENSORRT)}",
            )
        raise TargetError(f"Unknown target {text!r}", fix=nearest(text, known_targets()))


def local_gpu() -> str | None:
    """The target name of this machine's current GPU, such as `cuda:sm_90`; None where PyTorch can use none."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return f"rocm:{torch.cuda.get_device_properties().gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:sm_{major}{minor}"


def known_targets() -> list[str]:
    """Names of all targets."""
    return ["cpu", *GPUS]


def _gpu(
    name: str,
    gigabytes: int,
    terabytes_per_second: float,
    fp16: float,
    int8: float,
    fp8: float = 0.0,
) -> Target:
    kind, arch = name.split(":")
    rates = {
        "float16": fp16 * 1e12,
        "bfloat16": fp16 * 1e12,
        "int8": int8 * 1e12,
        "float32": fp16 * 1e12 / 8,
    }
    if fp8:
        rates["float8_e4m3fn"] = fp8 * 1e12
    return Target(name, kind, arch, (), gigabytes << 30, terabytes_per_second * 1e12, rates, ("triton",))


GPUS = {
    target.name: target
    for target in (
        _gpu("cuda:sm_80", 80, 2.04, 312, 624),
        _gpu("cuda:sm_89", 24, 1.01, 165, 661, 661),
        _gpu("cuda:sm_90", 80, 3.35, 989, 1979, 1979),
        _gpu("cuda:sm_100", 192, 8.0, 2250, 4500, 4500),
        _gpu("cuda:sm_120", 32, 1.79, 210, 838, 838),
        _gpu("rocm:gfx90a", 64, 1.6, 191, 191),
        _gpu("rocm:gfx942", 192, 5.3, 1307, 2615, 2615),
        _gpu("rocm:gfx950", 288, 8.0, 2300, 4600, 4600),
        _gpu("rocm:gfx1100", 24, 0.96, 123, 123),
    )
}
"""GPU targets: memory in GiB, bandwidth in TB/s, dense fp16, int8 and fp8 rates in tera-operations per second."""

TENSORRT = {
    f"tensorrt:{arch}": replace(GPUS[f"cuda:{arch}"], name=f"tensorrt:{arch}", kind="tensorrt", backends=("tensorrt",))
    for arch in ("sm_80", "sm_89", "sm_120")
}
GPUS |= TENSORRT

CPU_FEATURES = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip

TILE_FEATURES = ("amx_int8", "amx_bf16")

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
"""The x86-64 system call, its ARCH_REQ_XCOMP_PERM, and the number of AMX's tile registers among CPU states."""

BANDWIDTH_PER_CORE = 10.5e9
"""Bytes per second that one core reads from DRAM, an estimate where no measurement is given."""


@functools.cache
def host() -> Target:
    """The CPU of this machine."""
    features = cpu_features()
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    frequency = psutil.cpu_freq()
    hertz = (frequency.max or frequency.current) * 1e6 if frequency else 2.5e9
    lanes = 16 if "avx512f" in features else 8 if "avx2" in features else 4
    fp32 = cores * hertz * lanes * 2 * 2
    int8 = fp32 * 4 if {"avx512_vnni", "avx_vnni", "asimddp"} & set(features) else fp32
    return Target(
        name="cpu",
        kind="cpu",
        arch=os.uname().machine,
        features=features,
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=BANDWIDTH_PER_CORE * min(cores, 8),
        flops={"float32": fp32, "bfloat16": fp32, "int8": int8},
        backends=("tvm", "inductor"),
    )


def cpu_features() -> tuple[str, ...]:
    """The instruction set extensions of this CPU among those that kernels care about."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    found = tuple(feature for feature in CPU_FEATURES if feature in flags)
    if any(feature in TILE_FEATURES for feature in found) and not _tile_registers_granted():
        return tuple(feature for feature in found if feature not in TILE_FEATURES)
    return found


def _tile_registers_granted() -> bool:
    """Asks Linux for the registers of AMX, which a process may use only after it has asked."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0
