"""What goes into engines and what is left to PyTorch, and the files of both.

    found = plan(program, reasons, folder, builder)  # asks the builder until it takes all that is not left out
    facts = build(program, reasons, builder, target, directory, progress)

`<arch>.json` names the builder, the parts in the order in which they run, with inputs and outputs, and every node that
stayed out with the reason. `<arch>.<n>.engine` is the n-th part as an engine, `<arch>.<n>.graph.json` as a graph over
the artifact's weights.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import fx

from graphwright.backend import Progress
from graphwright.backends.tensorrt import engine
from graphwright.backends.tensorrt.builder import Builder, some
from graphwright.errors import BackendError
from graphwright.partition import Part, partition, too_small
from graphwright.program import Program
from graphwright.target import Target

SMALLEST = 4
"""Nodes below which a part without a weight matrix is not worth an engine, if there are other parts."""


@dataclass(frozen=True)
class Plan:
    """The parts in order, what each engine is built from, and every node that is left out with its reason."""

    parts: tuple[Part, ...]
    models: dict[tuple[str, ...], Any]
    left: dict[str, str]


def plan(program: Program, left: Mapping[str, str], folder: Path, builder: Builder) -> Plan:
    """Cuts the program into what the builder takes and what it does not.

    Args:
        program: what to cut.
        left: nodes that are known to be refused, with the reasons.
        folder: where files that engines are built from are written, each part's in a folder of its own.
        builder: whom to ask.

    Raises:
        BackendError: nothing is worth an engine; says why.
    """
    reasons: dict[str, str] = dict(left)
    models: dict[tuple[str, ...], Any] = {}
    while True:
        parts = partition(program, _outside(reasons))
        found = _too_small(parts) or _refused(parts, models, folder, builder)
        if not found:
            break
        reasons |= found
    if not any(part.taken for part in parts):
        raise BackendError(
            f"TensorRT takes no part of the program that is worth an engine: {some(reasons)}",
            fix="Use a recipe without what made these nodes, or another target",
        )
    return Plan(tuple(parts), models, reasons)


def _outside(reasons: Mapping[str, str]) -> Callable[[fx.Node], bool]:
    return lambda node: node.name not in reasons


def _too_small(parts: list[Part]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in parts:
        if too_small(part, parts, SMALLEST):
            reason = f"TensorRT takes it, and its part of {len(part.nodes)} between nodes that stay out is too small"
            found |= dict.fromkeys(part.nodes, reason)
    return found


def _refused(parts: list[Part], models: dict[tuple[str, ...], Any], folder: Path, builder: Builder) -> dict[str, str]:
    """What the builder refuses of the parts that it has not seen yet; models of those that it takes are kept."""
    found: dict[str, str] = {}
    for part in parts:
        if not part.taken or part.nodes in models:
            continue
        place = folder / f"{len(models)}.{len(part.nodes)}"
        place.mkdir(exist_ok=True)
        model, refused = builder.prepare(part, place)
        if not refused:
            models[part.nodes] = model
        found |= refused
    return found


def build(
    program: Program, left: Mapping[str, str], builder: Builder, target: Target, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Plans, builds every engine, and writes all files into `directory`; returns what `<arch>.json` says.

    A node that building refuses, though it was taken before, is left out too, and the plan made again.

    Raises:
        BackendError: a part is not built, and the reason names no node of it.
    """
    reasons = dict(left)
    while True:
        with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
            found = plan(program, reasons, Path(folder), builder)
            try:
                made, described = _write(program, found, builder, target, directory, progress)
                break
            except engine.BuildError as error:
                words = engine.NODE.findall(str(error))
                named = {n for n in words if any(n in part.nodes for part in found.parts if part.taken)}
                if not named:
                    raise
                reasons = found.left | dict.fromkeys(named, f"TensorRT's builder: {error.problem}")
    facts = {"arch": target.arch, "maker": asdict(made), "parts": described, "left": found.left}
    (directory / f"{target.arch}.json").write_text(json.dumps(facts, indent=1))
    return facts


def _write(
    program: Program, found: Plan, builder: Builder, target: Target, directory: Path, progress: Progress
) -> tuple[engine.Maker, list[dict[str, Any]]]:
    """Writes the file of every part; returns who made the engines, and the entries of the plan."""
    for old in directory.glob(f"{target.arch}.*"):
        old.unlink()  # of a plan whose builder has refused a node
    makers, entries = set(), []
    for index, part in enumerate(found.parts):
        entry: dict[str, Any] = {"nodes": len(part.nodes), "contract": part.program.contract.to_json()}
        if part.taken:
            profiles = engine.ranges(program.contract, part.sizes)
            built = builder.build(found.models[part.nodes], part, profiles, target.arch, progress)
            file = directory / f"{target.arch}.{index}.engine"
            file.write_bytes(built.data)
            makers.add(built.maker)
            entry |= {"kind": "engine", **built.to_json()}
        else:
            file = directory / f"{target.arch}.{index}.graph.json"
            file.write_text(json.dumps(part.program.to_json()))
            entry |= {"kind": "torch"}
        entries.append({**entry, "file": file.name})
    (made,) = makers
    return made, entries


__all__ = ["Plan", "build", "plan"]
