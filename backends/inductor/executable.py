"""Running a plan of compiled regions: one call per region, no Python per op.

Values live in a list of slots. Weights are put there once; a call puts its inputs and state there, runs the regions in
order, each reading and writing slots by number, and reads the outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.inductor.lowerings import Form
from graphwright.backends.inductor.regions import Plan
from graphwright.backends.inductor.subgraph import Source
from graphwright.calling import Arguments
from graphwright.contract import Contract
from graphwright.errors import ArtifactError

ALIGNMENT = 64
"""Bytes; compiled code reads weights with aligned vector loads."""


@dataclass(frozen=True)
class Step:
    """One call of a region: which library runs, and which slots it reads and writes."""

    library: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """A plan by slot numbers: what a fresh process needs to run the libraries."""

    slots: int
    weights: dict[str, int]
    inputs: dict[str, int]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    forms: tuple[Form, ...]

    @staticmethod
    def of(plan: Plan, forms: tuple[Form, ...]) -> "Schedule":
        """Numbers the sources and values of a plan."""
        numbers: dict[Source, int] = {}

        def number(source: Source) -> int:
            return numbers.setdefault(source, len(numbers))

        steps = tuple(
            Step(
                plan.regions[call.region].name,
                tuple(number(source) for source in call.sources),
                tuple(number(Source("value", name)) for name in call.outputs),
            )
            for call in plan.calls
        )
        outputs = tuple(number(source) for source in plan.outputs)
        kinds = {kind: {s.name: n for s, n in numbers.items() if s.kind == kind} for kind in ("weight", "input")}
        return Schedule(len(numbers), kinds["weight"], kinds["input"], steps, outputs, forms)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        return {**vars(self), "steps": [vars(step) for step in self.steps]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Schedule":
        """Rebuilds a schedule from plain data."""
        steps = tuple(Step(s["library"], tuple(s["inputs"]), tuple(s["outputs"])) for s in data["steps"])
        return Schedule(**{**data, "steps": steps, "outputs": tuple(data["outputs"]), "forms": tuple(data["forms"])})


class InductorExecutable:
    """A loaded schedule with its weights; may be called again and again, from one thread at a time."""

    def __init__(self, schedule: Schedule, contract: Contract, weights: Mapping[str, Tensor], directory: Path) -> None:
        self._schedule = schedule
        self._arguments = Arguments(contract)
        self._inputs = [schedule.inputs.get(name) for name in contract.names]
        self._slots: list[Any] = [None] * schedule.slots
        for name, slot in schedule.weights.items():
            self._slots[slot] = _aligned(weights[name])
        self._kept = frozenset(schedule.weights.values())
        self._forms = {form: _load(schedule, form, directory) for form in schedule.forms}

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs the form that fits the shapes of the inputs; state is written in place.

        Raises:
            BackendError: state that is not contiguous, or a cache with fewer slots than keys are asked for.
        """
        slots = self._slots
        for slot, value in zip(self._inputs, self._arguments(tensors), strict=True):
            if slot is not None:
                slots[slot] = value
        one = "decode" in self._forms and self._arguments.one_token(tensors)
        for run, inputs, outputs, dead in self._forms["decode" if one else "general"]:
            for slot, value in zip(outputs, run([slots[i] for i in inputs]), strict=True):
                slots[slot] = value
            for slot in dead:
                slots[slot] = None
        results = tuple(slots[slot] for slot in self._schedule.outputs)
        for slot in self._schedule.outputs:
            if slot not in self._kept:
                slots[slot] = None
        return results


def library_name(form: Form, region: str) -> str:
    """File of one compiled region."""
    return f"{form}-{region}.pt2"


def _dead(schedule: Schedule) -> list[tuple[int, ...]]:
    """Slots that nothing reads after each step, so that activations and caches are not held between calls."""
    kept = {*schedule.weights.values(), *schedule.outputs}
    last: dict[int, int] = {}
    for number, step in enumerate(schedule.steps):
        for slot in (*step.inputs, *step.outputs):
            last[slot] = number
    dead: list[list[int]] = [[] for _ in schedule.steps]
    for slot, number in last.items():
        if slot not in kept:
            dead[number].append(slot)
    return [tuple(slots) for slots in dead]


def _load(
    schedule: Schedule, form: Form, directory: Path
) -> list[tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    loaders: dict[str, Any] = {}
    for name in dict.fromkeys(step.library for step in schedule.steps):
        path = directory / library_name(form, name)
        try:
            loaders[name] = torch._inductor.aoti_load_package(str(path)).loader
        except RuntimeError as error:
            raise ArtifactError(f"Compiled library {path} cannot be loaded: {error}") from error
    return [
        (loaders[step.library].run, step.inputs, step.outputs, dead)
        for step, dead in zip(schedule.steps, _dead(schedule), strict=True)
    ]


def _aligned(weight: Tensor) -> Tensor:
    """The weight itself, or a copy where a memory map starts at an odd place."""
    dense = weight.detach().contiguous()
    return dense if dense.data_ptr() % ALIGNMENT == 0 else dense.clone()
