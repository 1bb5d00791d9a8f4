"""An even share of a matrix product for every program: tiles are cut where a share ends, and put together afterwards.

Osama et al. 2023, Stream-K, arXiv:2301.03598. Where tiles do not fill the device's last wave, units wait; here the
steps of all tiles stand in one row that programs divide evenly. A program writes a tile that it does alone; of a tile
that is cut, every program leaves its sum in a place of its own, and `join` adds them in the order of the steps. Nothing
waits for another program and nothing is added in the order of arrival, so equal calls give equal bits.

How many programs there are is a launch's grid, which depends on its configuration: as many as tiles is one tile for
each, and nothing to join.
"""

import functools
import math
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernels.triton.device import DEVICES, Device
from graphwright.kernels.triton.launch import Config, Launch, Runner, Work, cdiv
from graphwright.kernels.triton.model import LATENCY, blocks_seconds, fullest_unit_seconds

GAIN = 0.9
"""Share of the time that cutting tiles may take at most; a smaller gain is within the model's error."""

FEWEST_STEPS = 4
"""Steps of a share; shorter ones would mostly fill their pipeline."""

MOST_SHARES = 2
"""Programs per unit of the device among which the steps may be divided."""


@triton.jit
def join(
    parts_ptr, bias_ptr, out_ptr, rows, outputs, steps, share, tile_rows, tile_outputs, BLOCK: tl.constexpr
):  # fmt: skip
    """Some elements of the tile that program_id(0) + 1 begins in the middle of, if no program before does so too."""
    first = tl.program_id(0) + 1
    tile = first * share // steps
    start, end = tile * steps, (tile + 1) * steps
    if (first * share > start) & ((first - 1) * share <= start):
        size = tile_rows * tile_outputs
        item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(parts_ptr + (2 * first - 1) * size + item, mask=item < size, other=0.0)
        for program in range(first, tl.cdiv(end, share)):
            total += tl.load(parts_ptr + 2 * program * size + item, mask=item < size, other=0.0)
        high = tl.cdiv(rows, tile_rows)
        row = tile % high * tile_rows + item // tile_outputs
        output = tile // high * tile_outputs + item % tile_outputs
        inside = (item < size) & (row < rows) & (output < outputs)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + output, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row.to(tl.int64) * outputs + output, total.to(out_ptr.dtype.element_ty), mask=inside)


class Step(Protocol):
    """One step of a product over its inner dimension; hashable, as what follows from it is kept."""

    def work(self, config: Config, steps: float) -> Work:
        """The work of a program that takes so many steps."""
        ...


def tiles(rows: int, outputs: int, config: Config) -> int:
    """Tiles of a result under a configuration."""
    return cdiv(rows, config["BLOCK_M"]) * cdiv(outputs, config["BLOCK_N"])


def programs(rows: int, outputs: int, steps: int, config: Config, device: Device, step: Step) -> int:
    """The number of programs that the time model finds fastest: one for each tile, or some for each unit.

    Args:
        rows: of the result.
        outputs: its columns.
        steps: of one tile.
        config: with tiles of BLOCK_M by BLOCK_N.
        device: the machine.
        step: what is done in one.
    """
    return _programs(tiles(rows, outputs, config), steps, config, device.name, step)


@functools.lru_cache(maxsize=1 << 12)
def _programs(whole: int, steps: int, config: Config, name: str, step: Step) -> int:
    device = DEVICES[name]

    def seconds(count: int, steps: int) -> float:
        work = step.work(config, steps)
        return max(blocks_seconds(count, work, config, device), LATENCY + fullest_unit_seconds(count, work, device))

    best, least = whole, GAIN * seconds(whole, steps)
    for shares in range(1, MOST_SHARES + 1):
        share = max(FEWEST_STEPS, cdiv(whole * steps, shares * device.units))
        count = cdiv(whole * steps, share)
        if count == whole:
            continue
        # Sums are written, and read again; they might stay in the cache, which is not counted on.
        moved = 8 * sums(whole, steps, share) * config["BLOCK_M"] * config["BLOCK_N"]
        time = seconds(count, share) + LATENCY + moved / device.target.bandwidth
        if time < least:
            best, least = count, time
    return best


def sums(whole: int, steps: int, share: int) -> int:
    """Pieces of tiles that are cut, of `whole` tiles of `steps`, where every `share` steps a program begins."""
    begun = cdiv(whole * steps, share) - 1
    cuts = begun - begun * math.gcd(share, steps) // steps
    return cuts + min(cuts, whole)


def room(counts: dict[Config, int], rows: int, outputs: int, out: Tensor) -> Tensor:
    """Float32 sums of the tiles that are cut, two places for each program of the configuration that needs most."""
    needed = (
        2 * count * config["BLOCK_M"] * config["BLOCK_N"]
        for config, count in counts.items()
        if count != tiles(rows, outputs, config)
    )
    return torch.empty(max(needed, default=1), dtype=torch.float32, device=out.device)


def join_tiles(
    run: Runner, parts: Tensor, bias: Tensor | None, out: Tensor, rows: int, steps: int, count: int, config: Config
) -> None:
    """Puts the cut tiles of a product in `config` by `count` programs together into `out`, and adds the bias."""
    outputs = out.shape[-1]
    whole = tiles(rows, outputs, config)
    share, size = cdiv(whole * steps, count), config["BLOCK_M"] * config["BLOCK_N"]
    cuts = count - 1
    if count == whole:
        if not out.is_meta:
            return
        # Meta tensors ask for what may be launched, and another number of rows may be cut.
        cuts = 1
    run(
        Launch(
            join,
            {"parts_ptr": parts, "bias_ptr": bias, "out_ptr": out, "rows": rows, "outputs": outputs, "steps": steps,
             "share": share, "tile_rows": config["BLOCK_M"], "tile_outputs": config["BLOCK_N"]},
            {},
            (Config.of(4, BLOCK=1024), Config.of(4, BLOCK=512)),
            lambda c: (cuts, cdiv(size, c["BLOCK"])),
            lambda c: Work(2 * c["BLOCK"], 12 * c["BLOCK"]),
            static=frozenset(("outputs",)),
        )
    )  # fmt: skip
