"""What a compiled kernel says of itself: registers, spills, shared memory, instructions, and the gates it must pass.

NVIDIA binaries are read with the disassembler that comes with Triton, AMD ones from the assembly text.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphwright.errors import BackendError
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import Config
from graphwright.kernels.triton.model import Usage, occupancy, resident

NVIDIA_MATRIX = re.compile(r"\b(?:[BHIQ]MMA|[HIQ]GMMA|UTC[HIQ]MMA|OMMA|UTCOMMA)\b")
NVIDIA_LOAD = re.compile(r"\bLDG(?:STS)?(?:\.\w+)*")
NVIDIA_SPILL = re.compile(r"\b(?:STL|LDL)\b")
NVIDIA_WIDTH = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}

AMD_MATRIX = re.compile(r"^\s*v_(?:s?mfma|smfmac|s?wmma)\w*", re.MULTILINE)
AMD_LOAD = re.compile(r"^\s*(?:global|buffer)_load_(\w+)", re.MULTILINE)
AMD_WIDTH = {
    "dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32,
    "lds_dwordx4": 128, "lds_dword": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a kernel.

    Attributes:
        registers: 32-bit registers of a thread, accumulation registers included.
        spills: instructions, or registers on AMD, that go through memory for want of registers.
        shared: bytes of shared memory (LDS) of a block.
        matrix: matrix instructions by opcode.
        loads: instructions that load from device memory by width in bits.
        instructions: all of them.
    """

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    loads: dict[int, int]
    instructions: int

    @property
    def matrix_count(self) -> int:
        """Matrix instructions of any kind."""
        return sum(self.matrix.values())

    @property
    def widest_load(self) -> int:
        """Bits of the widest load from device memory."""
        return max(self.loads, default=0)

    @property
    def usage(self) -> Usage:
        """What the time model needs."""
        return Usage(self.registers, self.shared)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Resources":
        """Rebuilds resources from plain data."""
        return Resources(**{**data, "loads": {int(width): n for width, n in data["loads"].items()}})


def read_nvidia(cubin: bytes, shared: int) -> Resources:
    """Resources of a cubin; `shared` is what a launch asks for.

    Raises:
        BackendError: the disassembler refuses the file.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    loads: Counter[int] = Counter()
    for load in NVIDIA_LOAD.findall(code):
        loads[next((NVIDIA_WIDTH[part] for part in load.split(".") if part in NVIDIA_WIDTH), 32)] += 1
    return Resources(
        registers,
        len(NVIDIA_SPILL.findall(code)),
        shared,
        dict(Counter(NVIDIA_MATRIX.findall(code))),
        dict(loads),
        len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{Path(tool).name} cannot read a compiled kernel: {done.stderr.strip()}")
    return done.stdout


def read_amd(assembly: str, shared: int) -> Resources:
    """Resources from the assembly text of a kernel."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    loads = Counter(
        AMD_WIDTH.get(kind, 16 if "short" in kind or "16" in kind else 8) for kind in AMD_LOAD.findall(assembly)
    )
    matrix = Counter(name.strip() for name in AMD_MATRIX.findall(assembly))
    # The vector count of a kernel with accumulation registers already includes them.
    return Resources(
        field("vgpr_count"),
        field("vgpr_spill_count"),
        shared,
        dict(matrix),
        dict(loads),
        len(re.findall(r"^\t[svdgb][a-z]*_\w+", assembly, re.MULTILINE)),
    )


def failures(resources: Resources, config: Config, device: Device, *, matrix: bool) -> list[str]:
    """The gates that a kernel fails, in words; empty when it passes all."""
    found = []
    if resources.spills:
        found.append(f"{resources.spills} register spills")
    if matrix and not resources.matrix_count:
        found.append(f"no {device.matrix_unit} instruction")
    if resources.shared > device.shared_block:
        found.append(f"{resources.shared} bytes of shared memory, and a block has {device.shared_block}")
    elif resident(config, resources.usage, device) == 0:
        found.append(f"{resources.registers} registers in {config.num_warps} warps do not fit a unit")
    return found


def occupied(resources: Resources, config: Config, device: Device) -> float:
    """Warps on a unit as a fraction of the most it can hold."""
    return occupancy(config, resources.usage, device)
