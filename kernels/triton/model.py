"""The time that a launch should take, from what its blocks do and what the device offers.

A roofline per block with wave quantisation: blocks run in waves of as many as fit the device at once; a wave takes the
longer of its arithmetic at the peak rate of the units it uses and its traffic at the bandwidth that its loads in
flight can draw.
It ranks configurations before they are compiled, from an estimate of their shared memory, and again afterwards,
from the registers and shared memory that the compiler really used.
"""

from dataclasses import dataclass

from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import Config, Launch, Work, cdiv

REGISTERS_PER_WARP_STEP = 256
BLOCKS_PER_UNIT = 32
LATENCY = 2e-6
"""Seconds from launch to first result; what keeps a kernel of many tiny blocks from looking free."""

MEMORY_LATENCY = 7e-7
"""Seconds until a load from device memory arrives; what is in flight over it bounds the bandwidth (Little's law)."""


@dataclass(frozen=True)
class Usage:
    """What one block holds while it runs.

    Attributes:
        registers: 32-bit registers of one thread.
        shared: bytes of shared memory.
    """

    registers: int = 128
    shared: int = 0


def resident(config: Config, usage: Usage, device: Device) -> int:
    """How many blocks of a configuration one unit holds at once; 0 when it cannot run even one."""
    if usage.shared > device.shared_block:
        return 0
    per_warp = cdiv(max(usage.registers, 1) * device.warp_size, REGISTERS_PER_WARP_STEP) * REGISTERS_PER_WARP_STEP
    by_registers = device.registers_unit // (per_warp * config.num_warps)
    by_shared = device.shared_unit // (usage.shared + 1024) if usage.shared else BLOCKS_PER_UNIT
    return min(by_registers, max(by_shared, 1), device.warps_unit // config.num_warps, BLOCKS_PER_UNIT)


def occupancy(config: Config, usage: Usage, device: Device) -> float:
    """Warps on a unit as a fraction of the most it can hold."""
    return resident(config, usage, device) * config.num_warps / device.warps_unit


def seconds(launch: Launch, config: Config, device: Device, usage: Usage | None = None) -> float:
    """Modelled time of one launch; infinite for a configuration that does not fit the device."""
    blocks = 1
    for size in launch.grid(config):
        blocks *= size
    return blocks_seconds(blocks, launch.work(config), config, device, usage)


def blocks_seconds(blocks: int, work: Work, config: Config, device: Device, usage: Usage | None = None) -> float:
    """Modelled time of a launch of `blocks` that each do `work`; infinite for what does not fit the device."""
    held = resident(config, usage or Usage(), device)
    if held == 0:
        return float("inf")
    waves = cdiv(blocks, held * device.units)
    busy = min(blocks / waves, held * device.units)
    # Blocks of one wave spread over the units before they share one.
    units = min(busy, device.units)
    rate = device.target.flops.get(work.unit, device.target.flops["float32"]) * units / device.units
    in_flight = busy * (min(work.in_flight, work.bytes) or work.bytes)
    bandwidth = min(device.target.bandwidth, in_flight / MEMORY_LATENCY)
    return LATENCY + waves * max(work.flops * busy / rate, work.bytes * busy / bandwidth)


def fullest_unit_seconds(blocks: int, work: Work, device: Device) -> float:
    """Arithmetic of the unit with the most of `blocks`, while others may have run out of them."""
    rate = device.target.flops.get(work.unit, device.target.flops["float32"]) / device.units
    return cdiv(blocks, device.units) * work.flops / rate


def rank(launch: Launch, device: Device) -> list[Config]:
    """The launch's configurations, most promising first."""
    return sorted(launch.configs, key=lambda config: seconds(launch, config, device))
