"""The artifact: a directory that holds a compiled program and runs in a fresh process.

    manifest.json        versions, target, backend, and the size and SHA-256 of every file below
    program.json         graph, contract, metadata, history
    weights.safetensors  the weights, memory-mapped when loaded
    kernels/             what the backend compiled
    tokenizer/           if the model has one
    report.json, report.html

Writing goes to a temporary directory beside the final place and ends in one rename, so a failed write leaves
nothing behind. Loading checks everything the manifest says before any of it is used.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from graphwright.errors import ArtifactError
from graphwright.target import Target

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself."""

    format: int
    graphwright: str
    torch: str
    python: str
    target: str
    arch: str
    features: tuple[str, ...]
    backend: str
    recipe: dict[str, Any]
    files: dict[str, dict[str, Any]]
    also: tuple[str, ...] = ()
    """Targets besides `target` that the artifact holds kernels for."""
    export: dict[str, Any] = field(default_factory=dict)
    """Of an export: its format, options, and what the format says of it."""
    builder: str = ""
    """What built the backend's own code, with versions, where the backend has several ways."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Every target that the artifact runs on."""
        return (self.target, *self.also)


@contextmanager
def atomic_directory(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `final` when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: `final` exists and is not an artifact that may be overwritten, or cannot be written.
    """
    final = Path(final).absolute()
    _refuse_existing(final, overwrite)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise ArtifactError(f"Directory {final} cannot be written: {error.strerror}") from error
    try:
        yield work
        work.chmod(0o755)
        _put_in_place(work, final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _put_in_place(work: Path, final: Path) -> None:
    """Renames `work` to `final`; what was there is moved aside first, so that it is never half-deleted."""
    if not final.exists():
        os.replace(work, final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    os.replace(final, old)
    try:
        os.replace(work, final)
    except BaseException:
        os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_existing(final: Path, overwrite: bool) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not final.is_dir() or not (final / MANIFEST).exists():
        raise ArtifactError(f"{final} exists and is no Graphwright artifact", fix="Choose another directory")
    if not overwrite:
        raise ArtifactError(f"{final} holds an artifact already", fix="Pass overwrite=True, or --force")


def write_manifest(
    directory: Path,
    target: Target,
    backend: str,
    recipe: Mapping[str, Any],
    also: tuple[str, ...] = (),
    export: Mapping[str, Any] | None = None,
    builder: str = "",
) -> None:
    """Writes the manifest over all files that are in `directory` now."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    data = {
        "format": FORMAT,
        "graphwright": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "target": target.name,
        "arch": target.arch,
        "features": list(target.features),
        "backend": backend,
        "recipe": dict(recipe),
        "also": list(also),
        **({"export": dict(export)} if export else {}),
        **({"builder": builder} if builder else {}),
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(data, indent=1))


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest, with its format and keys checked.

    Raises:
        ArtifactError: not an artifact, unreadable, or of another format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} is no Graphwright artifact: it has no {MANIFEST}")
    try:
        data = json.loads(path.read_text())
        manifest = Manifest(**{**data, "features": tuple(data["features"]), "also": tuple(data.get("also", ()))})
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix="Compile the model again") from error
    if manifest.format != FORMAT:
        raise ArtifactError(
            f"{directory} is an artifact of format {manifest.format}; this version reads format {FORMAT}",
            fix=f"Compile the model again, or use graphwright {manifest.graphwright}",
        )
    return manifest


def verify(directory: Path | str, target: Target) -> Manifest:
    """Checks versions, target and every file's size and hash.

    Raises:
        ArtifactError: the first thing that does not agree.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    _check_versions(folder, manifest)
    _check_target(folder, manifest, target)
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry)
    return manifest


def _check_versions(folder: Path, manifest: Manifest) -> None:
    compiled, installed = manifest.torch.partition("+")[0], torch.__version__.partition("+")[0]
    if compiled != installed:
        raise ArtifactError(
            f"{folder} was compiled with torch {compiled}, and torch {installed} is installed",
            fix=f"Install torch {compiled}, or compile the model again",
        )


def _check_target(folder: Path, manifest: Manifest, target: Target) -> None:
    if target.name in manifest.also:
        return
    if manifest.target != target.name or manifest.arch != target.arch:
        made_for = ", ".join((f"{manifest.target} ({manifest.arch})", *manifest.also))
        raise ArtifactError(
            f"{folder} was compiled for {made_for}, and this is {target.name} ({target.arch})",
            fix="Compile the model for this machine",
        )
    missing = sorted(set(manifest.features) - set(target.features))
    if missing:
        raise ArtifactError(
            f"{folder} uses CPU features that this machine lacks: {', '.join(missing)}",
            fix="Compile the model on this machine",
        )


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ArtifactError(f"File {path} is missing from the artifact", fix="Copy the artifact again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(
            f"File {path} is {size} bytes long and should be {entry['bytes']}", fix="Copy the artifact again"
        )
    if digest(path) != entry["sha256"]:
        raise ArtifactError(f"File {path} was altered: its SHA-256 differs", fix="Copy the artifact again")


def digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version() -> str:
    """The installed version of graphwright."""
    return metadata.version("graphwright")
