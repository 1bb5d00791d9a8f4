"""Autotuning: the schedule of each integer layer's kernel of many rows, picked by measurement within a time budget.

    found = tune(program, target, seconds=60, progress=progress)
    build(program, target, file, progress, {one.layer: one.schedule for one in found})

Schedules change speed and nothing else. The layers that take the most time come first; those that the budget does not
reach keep the default schedule, which is also what a compile without tuning uses. What was found is written beside the
library and listed by `graphwright inspect ARTIFACT --kernels`.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm import tirx

from graphwright.backend import Progress
from graphwright.backends.tvm import threads
from graphwright.backends.tvm.build import build_kernels, translate
from graphwright.kernels.tir import amx
from graphwright.kernels.tir.isa import Isa, choose
from graphwright.kernels.tir.linear import Linear, Schedule
from graphwright.kernels.tir.quantized_linear import DEFAULT, code_row, matrix
from graphwright.kernels.tir.tiles import ROWS
from graphwright.program import Program
from graphwright.target import Target

TUNED_ROWS = 512
"""Tokens of the prefill that candidates are measured on."""

ROUNDS = 5
"""Candidates take turns; the median of their times counts."""

WORTH = 0.97
"""A candidate replaces the best so far where it takes less than this share of its time."""

FILE = "tuning.json"


@dataclass(frozen=True)
class Tuned:
    """What was found for one kernel.

    Attributes:
        layer: the layer that the kernel computes.
        calls: layers of the program that it serves.
        schedule: the best one.
        milliseconds: its median time for `TUNED_ROWS` rows.
        default_milliseconds: that of the default schedule, measured in turns with it.
    """

    layer: Linear
    calls: int
    schedule: Schedule
    milliseconds: float
    default_milliseconds: float


def tune(program: Program, target: Target, seconds: float, progress: Progress) -> list[Tuned]:
    """Measures schedules for the integer layers of a prepared program, on this machine, until `seconds` are over."""
    deadline = time.perf_counter() + seconds
    layers, isa = integer_layers(program, target), choose(target.features)
    threads.follow_torch()
    found = []
    for number, (layer, calls) in enumerate(layers):
        progress(f"tune layer {number + 1} of {len(layers)}", number / len(layers))
        if time.perf_counter() >= deadline:
            break
        found.append(_tuned(layer, calls, isa, target, deadline))
    return found


def integer_layers(program: Program, target: Target) -> list[tuple[Linear, int]]:
    """The distinct layers that have an integer kernel of many rows and how often they occur, the most work first."""
    counts: Counter[Linear] = Counter()

    def count(layer: Linear) -> Schedule:
        counts[layer] += 1
        return DEFAULT

    translate(program, target, ("general",), count)
    return sorted(counts.items(), key=lambda pair: -pair[1] * pair[0].outputs * pair[0].inputs)


def save(found: Sequence[Tuned], directory: Path) -> None:
    """Writes what was found beside the library."""
    (directory / FILE).write_text(json.dumps([asdict(one) for one in found], indent=1))


def load(directory: Path) -> list[Tuned]:
    """What `save` wrote; nothing where a program was compiled without tuning."""
    if not (directory / FILE).is_file():
        return []
    rows: list[dict[str, Any]] = json.loads((directory / FILE).read_text())
    return [Tuned(**{**row, "layer": Linear(**row["layer"]), "schedule": Schedule(**row["schedule"])}) for row in rows]


def _tuned(layer: Linear, calls: int, isa: Isa, target: Target, deadline: float) -> Tuned:
    """Descends along one choice after another, each from the best of those before."""
    best = DEFAULT
    times: dict[Schedule, float] = {}
    for choices in steps(layer, isa):
        candidates = list(dict.fromkeys([best, *(replace(best, **choice) for choice in choices)]))
        if len(candidates) == 1 or (times and time.perf_counter() >= deadline):
            continue
        times |= _measure(layer, isa, target, candidates)
        fastest = min(candidates, key=times.__getitem__)
        best = fastest if times[fastest] < WORTH * times[best] else best
    if best == DEFAULT:
        return Tuned(layer, calls, best, times.get(best, 0.0), times.get(best, 0.0))
    last = _measure(layer, isa, target, [DEFAULT, best])
    if last[best] >= last[DEFAULT]:
        best = DEFAULT
    return Tuned(layer, calls, best, last[best], last[DEFAULT])


def steps(layer: Linear, isa: Isa) -> Iterator[list[dict[str, Any]]]:
    """What may be changed, one thing after the other; a choice that makes no difference for a layer is left out."""
    if isa.tiles and amx.depth(code_row(layer).group_size):
        yield [{"tile_registers": False}]
    yield [{"rows_per_task": rows} for rows in (64, 256, TUNED_ROWS)]
    yield [{"row_block": rows, "tile_registers": False} for rows in (2, 6)]


def _measure(layer: Linear, isa: Isa, target: Target, candidates: Sequence[Schedule]) -> dict[Schedule, float]:
    """Median milliseconds of each candidate; they take turns, so that a disturbance meets all of them."""
    lead = (tirx.Var("batch", "int64"), tirx.Var("sequence", "int64"))
    functions = {}
    for number, schedule in enumerate(candidates):
        name = f"candidate_{number}"
        functions[name] = matrix(layer, isa, lead, schedule).with_attr("global_symbol", name)
    library = tvm.runtime.Executable(build_kernels(tvm.IRModule(functions), target)).jit()
    tensors = [tvm.runtime.tensor(tensor.numpy()) for tensor in operands(layer)]
    seconds: dict[Schedule, list[float]] = {schedule: [] for schedule in candidates}
    for turn in range(ROUNDS + 1):
        for name, schedule in zip(functions, candidates, strict=True):
            started = time.perf_counter()
            library[name](*tensors)
            if turn:  # the first one warms up
                seconds[schedule].append(time.perf_counter() - started)
    return {schedule: 1e3 * statistics.median(values) for schedule, values in seconds.items()}


def operands(layer: Linear) -> list[Tensor]:
    """Arguments of a layer's kernel, in the order in which it takes them; integer products take as long for zeros."""
    groups = (layer.tiles, layer.groups, ROWS)
    made = [
        torch.zeros(1, TUNED_ROWS, code_row(layer).bytes, dtype=torch.int8),
        torch.zeros(layer.tiles, layer.groups * layer.vectors * 4 * ROWS, dtype=torch.uint8),
        torch.zeros(groups, dtype=getattr(torch, layer.scale_dtype)),
    ]
    if layer.asymmetric:
        made.append(torch.zeros(groups, dtype=torch.uint8))
    if layer.bias:
        made.append(torch.zeros(layer.outputs))
    if layer.residual:
        made.append(torch.zeros(1, TUNED_ROWS, layer.width))
    return [*made, torch.zeros(1, TUNED_ROWS, layer.width)]
