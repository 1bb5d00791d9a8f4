"""The files of compiled kernels: `<target>/index.json` beside one file of machine code per kernel."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphwright.backends.triton.build import Found
from graphwright.backends.triton.machine_code import Resources, occupied
from graphwright.errors import ArtifactError
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Config, Problem

INDEX = "index.json"

TELLING = ("ACTIVATION", "GROUP_SIZE", "HEAD_DIM", "HIGH", "PARTS", "ROTARY", "WIDTH")
"""Constants that tell people which calls a kernel is for."""


@dataclass(frozen=True)
class Entry:
    """One kernel of an artifact.

    Attributes:
        problem: what it serves.
        config: the configuration it was compiled in.
        file: its machine code.
        name: symbol in the file.
        shared: bytes of shared memory that a launch must ask for.
        resources: what the compiler made of it.
        seconds: modelled time of the largest launch that was planned.
        refused: configurations that were tried before, with the reason against each.
    """

    problem: Problem
    config: Config
    file: Path
    name: str
    shared: int
    resources: Resources
    seconds: float
    refused: dict[str, str]


def folder_of(target: str) -> str:
    """Name of the folder of one target."""
    return target.replace(":", "-")


def targets_in(directory: Path) -> list[str]:
    """Targets that a directory holds kernels for."""
    return [name for name in DEVICES if (directory / folder_of(name) / INDEX).is_file()]


def write(directory: Path, target: str, found: Sequence[Found]) -> list[Entry]:
    """Copies the binaries of `found`, all of which have one, and writes the index."""
    folder = directory / folder_of(target)
    folder.mkdir()
    entries = []
    for one in found:
        binary = one.binary
        if binary is None:
            raise ArtifactError(f"Kernel {one.problem.kernel} has no binary for {target}")
        file = folder / f"{one.problem.key}{binary.path.suffix}"
        shutil.copyfile(binary.path, file)
        entries.append(
            Entry(
                one.problem, binary.config, file, binary.name, binary.shared, binary.resources, binary.seconds,
                one.refused,
            )
        )  # fmt: skip
    (folder / INDEX).write_text(json.dumps([_to_json(entry) for entry in entries], indent=1))
    return entries


def read(directory: Path, target: str) -> list[Entry]:
    """The entries of one target.

    Raises:
        ArtifactError: there is no index for the target, or it cannot be read.
    """
    path = directory / folder_of(target) / INDEX
    if not path.is_file():
        held = ", ".join(targets_in(directory)) or "none"
        raise ArtifactError(f"The artifact holds no kernels for {target}", fix=f"It holds kernels for {held}")
    try:
        return [_from_json(entry, path.parent) for entry in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix="Compile the model again") from error


def rows(entries: Sequence[Entry], target: str) -> list[dict[str, Any]]:
    """One line per kernel for people."""
    device = DEVICES[target]
    return [
        {
            "target": target,
            "kernel": entry.problem.kernel,
            "serves": " ".join(f"{k}={v}" for k, v in entry.problem.constants if k in TELLING),
            "config": str(entry.config),
            "registers": entry.resources.registers,
            "spills": entry.resources.spills,
            "shared": f"{entry.shared} of {device.shared_block}",
            "occupancy": f"{occupied(entry.resources, entry.config, device):.0%}",
            "matrix": " ".join(f"{n} {op}" for op, n in entry.resources.matrix.items()),
            "loads": " ".join(f"{n}x{width}" for width, n in sorted(entry.resources.loads.items(), reverse=True)),
            "estimate": f"{entry.seconds * 1e6:.1f} us",
            "refused": len(entry.refused),
        }
        for entry in entries
    ]


def _to_json(entry: Entry) -> dict[str, Any]:
    problem, config = entry.problem, entry.config
    return {
        "problem": {**vars(problem), "configs": [_config_to_json(c) for c in problem.configs]},
        "config": _config_to_json(config),
        "file": entry.file.name,
        "name": entry.name,
        "shared": entry.shared,
        "resources": entry.resources.to_json(),
        "seconds": entry.seconds,
        "refused": entry.refused,
    }


def _from_json(data: dict[str, Any], folder: Path) -> Entry:
    problem = data["problem"]
    return Entry(
        Problem(
            problem["module"],
            problem["kernel"],
            _pairs(problem["types"]),
            tuple(problem["aligned"]),
            _pairs(problem["constants"]),
            tuple(_config_from_json(c) for c in problem["configs"]),
            problem["matrix"],
        ),
        _config_from_json(data["config"]),
        folder / data["file"],
        data["name"],
        data["shared"],
        Resources.from_json(data["resources"]),
        data["seconds"],
        data["refused"],
    )


def _pairs(data: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in data)


def _config_to_json(config: Config) -> list[Any]:
    return [config.constants, config.num_warps, config.num_stages]


def _config_from_json(data: list[Any]) -> Config:
    return Config(_pairs(data[0]), data[1], data[2])
