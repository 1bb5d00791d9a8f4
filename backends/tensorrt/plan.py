"""What goes into engines and what is left to PyTorch, and the files of both.

    found = plan(program, reasons, folder)           # asks the parser until it takes all that is not left out
    facts = build(program, reasons, target, directory, progress)

`<arch>.json` names the parts in the order in which they run, with inputs and outputs, and every node that stayed out
with the reason. `<arch>.<n>.engine` is the n-th part as an engine, `<arch>.<n>.graph.json` as a graph over the
artifact's weights.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from graphwright.backend import Progress
from graphwright.backends.onnx import model
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.translate import RefusalError
from graphwright.backends.tensorrt import engine
from graphwright.errors import BackendError
from graphwright.partition import Part, partition, too_small
from graphwright.program import Program
from graphwright.target import Target

SMALLEST = 4
"""Nodes below which a part without a weight matrix is not worth an engine, if there are other parts."""

NODE = re.compile(r"([A-Za-z_]\w*)/[A-Z]\w*_\d+")
"""How translations name what a node becomes; see `graphwright.backends.onnx.builder`."""

PROFILE = OnnxOptions(profile="tensorrt")


@dataclass(frozen=True)
class Plan:
    """The parts in order, the model of each that becomes an engine, and every node that is left out with its reason."""

    parts: tuple[Part, ...]
    models: dict[tuple[str, ...], Path]
    left: dict[str, str]


def plan(program: Program, left: Mapping[str, str], folder: Path) -> Plan:
    """Cuts the program into what TensorRT's parser takes and what it does not.

    Args:
        program: what to cut.
        left: nodes that are known to be refused, with the reasons.
        folder: where the models of the engines' parts are written, as `<n>/model.onnx`.

    Raises:
        BackendError: nothing is worth an engine; says why.
    """
    reasons: dict[str, str] = dict(left)
    models: dict[tuple[str, ...], Path] = {}
    while True:
        parts = partition(program, _outside(reasons))
        found = _too_small(parts) or _refused(parts, models, folder)
        if not found:
            break
        reasons |= found
    if not any(part.taken for part in parts):
        raise BackendError(
            f"TensorRT takes no part of the program that is worth an engine: {_some(reasons)}",
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


def _refused(parts: list[Part], models: dict[tuple[str, ...], Path], folder: Path) -> dict[str, str]:
    """What the parser refuses of the parts that it has not seen yet; models of those that it takes are kept."""
    found: dict[str, str] = {}
    for part in parts:
        if not part.taken or part.nodes in models:
            continue
        place = folder / f"{len(models)}.{len(part.nodes)}"
        refused = refusals(part, place)
        if not refused:
            models[part.nodes] = place / model.MODEL
        found |= refused
    return found


def refusals(part: Part, folder: Path) -> dict[str, str]:
    """The nodes of a part that the translation or TensorRT's parser refuses, with the reasons.

    Raises:
        BackendError: the parser refuses the model, and names nothing that is a node of the part.
    """
    folder.mkdir(exist_ok=True)
    try:
        model.save(model.build(part.program, PROFILE), folder)
    except RefusalError as refusal:
        return {refusal.node: f"profile tensorrt of ONNX: {refusal.problem}"}
    refused = engine.refused(folder / model.MODEL)
    found = {name.partition("/")[0]: reason for name, reason in refused.items()}
    known = {name: f"TensorRT's parser: {reason}" for name, reason in found.items() if name in part.nodes}
    if refused and not known:
        raise BackendError(f"TensorRT's parser refuses a part of the program: {_some(refused)}")
    return known


def _some(reasons: Mapping[str, str], most: int = 8) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:most])
    return shown + (f"; and {len(reasons) - most} more" if len(reasons) > most else "")


def build(
    program: Program, left: Mapping[str, str], target: Target, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Plans, builds every engine, and writes all files into `directory`; returns what `<arch>.json` says.

    A node that the builder refuses, though the parser took it, is left out too, and the plan made again.

    Raises:
        BackendError: the builder refuses a part without naming a node of it.
    """
    reasons = dict(left)
    while True:
        with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
            found = plan(program, reasons, Path(folder))
            try:
                described = _write(program, found, target, directory, progress)
                break
            except engine.BuildError as error:
                named = {n for n in NODE.findall(str(error)) if any(n in p.nodes for p in found.parts if p.taken)}
                if not named:
                    raise
                reasons = found.left | dict.fromkeys(named, f"TensorRT's builder: {error.problem}")
    facts = {"arch": target.arch, "parts": described, "left": found.left}
    (directory / f"{target.arch}.json").write_text(json.dumps(facts, indent=1))
    return facts


def _write(program: Program, found: Plan, target: Target, directory: Path, progress: Progress) -> list[dict[str, Any]]:
    """Writes the file of every part; returns the entries of the plan."""
    for old in directory.glob(f"{target.arch}.*"):
        old.unlink()  # of a plan whose builder has refused a node
    entries = []
    for index, part in enumerate(found.parts):
        entry: dict[str, Any] = {"nodes": len(part.nodes), "contract": part.program.contract.to_json()}
        if part.taken:
            profiles = engine.ranges(program.contract, part.sizes)
            built = engine.build(found.models[part.nodes], profiles, target.arch, progress)
            file = directory / f"{target.arch}.{index}.engine"
            file.write_bytes(built.data)
            entry |= {"kind": "engine", **built.to_json()}
        else:
            file = directory / f"{target.arch}.{index}.graph.json"
            file.write_text(json.dumps(part.program.to_json()))
            entry |= {"kind": "torch"}
        entries.append({**entry, "file": file.name})
    return entries


__all__ = ["Plan", "build", "plan", "refusals"]
