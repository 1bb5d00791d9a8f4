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
        self._inputs = [(name, schedule.inputs[name]) for name in contract.names if name in schedule.inputs]
        self._slots: list[Any] = [None] * schedule.slots
        for name, slot in schedule.weights.items():
            self._slots[slot] = _aligned(weights[name])
        self._forms = {form: _load(schedule, form, directory) for form in schedule.forms}
        roles = ("token", "logit_index")
        self._single = [spec.name for spec in contract.inputs if spec.role in roles]

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs the form that fits the shapes of the inputs; state is written in place."""
        slots = self._slots
        for name, slot in self._inputs:
            slots[slot] = tensors[name].contiguous()
        one = "decode" in self._forms and all(tensors[name].numel() == 1 for name in self._single)
        for run, inputs, outputs in self._forms["decode" if one else "general"]:
            for slot, value in zip(outputs, run([slots[i] for i in inputs]), strict=True):
                slots[slot] = value
        return tuple(slots[slot] for slot in self._schedule.outputs)


def library_name(form: Form, region: str) -> str:
    """File of one compiled region."""
    return f"{form}-{region}.pt2"


def _load(schedule: Schedule, form: Form, directory: Path) -> list[tuple[Any, tuple[int, ...], tuple[int, ...]]]:
    loaders: dict[str, Any] = {}
    for name in dict.fromkeys(step.library for step in schedule.steps):
        path = directory / library_name(form, name)
        try:
            loaders[name] = torch._inductor.aoti_load_package(str(path)).loader
        except RuntimeError as error:
            raise ArtifactError(f"Compiled library {path} cannot be loaded: {error}") from error
    return [(loaders[step.library].run, step.inputs, step.outputs) for step in schedule.steps]


def _aligned(weight: Tensor) -> Tensor:
    """The weight itself, or a copy where a memory map starts at an odd place."""
    dense = weight.detach().contiguous()
    return dense if dense.data_ptr() % ALIGNMENT == 0 else dense.clone()
