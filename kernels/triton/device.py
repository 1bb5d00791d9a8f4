"""What a kernel may use of each GPU: the limits that decide which configurations fit and how many run at once.

Figures are the vendors', for one device, or one die where a card carries two: CUDA C++ Programming Guide ("Technical
Specifications per Compute Capability") and AMD's CDNA and RDNA instruction set manuals.
"""

from dataclasses import dataclass

from graphwright.errors import TargetError, nearest
from graphwright.target import GPUS, Target

KIB = 1024


@dataclass(frozen=True)
class Device:
    """Limits of one GPU architecture.

    Attributes:
        target: names, memory and peak rates.
        warp_size: threads that run in lockstep.
        units: streaming multiprocessors, or compute units.
        shared_block: bytes of shared memory (LDS) that one block may use.
        shared_unit: bytes that the blocks on one unit share.
        registers_unit: 32-bit registers of one unit, over all its threads.
        registers_thread: most registers of one thread.
        warps_unit: most warps on one unit.
        matrix_unit: the matrix instruction: `mma`, `wgmma`, `tcgen05`, `mfma` or `wmma`.
        fp8: whether matrix instructions take fp8 operands.
    """

    target: Target
    warp_size: int
    units: int
    shared_block: int
    shared_unit: int
    registers_unit: int
    registers_thread: int
    warps_unit: int
    matrix_unit: str
    fp8: bool

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @staticmethod
    def of(target: Target) -> "Device":
        """The limits of a GPU target.

        Raises:
            TargetError: the target is no GPU of the table.
        """
        if target.name not in DEVICES:
            raise TargetError(
                f"There are no Triton kernels for the target {target.name}", fix=nearest(target.name, DEVICES)
            )
        return DEVICES[target.name]


def _cuda(name: str, units: int, shared_block: int, shared_unit: int, warps: int, matrix: str, fp8: bool) -> Device:
    return Device(
        GPUS[name], 32, units, shared_block * KIB, shared_unit * KIB, 65536, 255, warps, matrix, fp8
    )  # fmt: skip


DEVICES = {
    device.name: device
    for device in (
        _cuda("cuda:sm_80", 108, 163, 164, 64, "mma", False),
        _cuda("cuda:sm_89", 128, 99, 100, 48, "mma", True),
        _cuda("cuda:sm_90", 132, 227, 228, 64, "wgmma", True),
        _cuda("cuda:sm_100", 148, 227, 228, 64, "tcgen05", True),
        _cuda("cuda:sm_120", 170, 99, 100, 48, "mma", True),
        Device(GPUS["rocm:gfx90a"], 64, 110, 64 * KIB, 64 * KIB, 131072, 512, 32, "mfma", False),
        Device(GPUS["rocm:gfx942"], 64, 304, 64 * KIB, 64 * KIB, 131072, 512, 32, "mfma", False),
        Device(GPUS["rocm:gfx950"], 64, 256, 160 * KIB, 160 * KIB, 131072, 512, 32, "mfma", True),
        Device(GPUS["rocm:gfx1100"], 32, 96, 64 * KIB, 64 * KIB, 98304, 256, 32, "wmma", False),
    )
}
"""Limits by target name. gfx942 multiplies fp8 too, in a format of its own that PyTorch calls e4m3fnuz; no kernel here
uses it."""
