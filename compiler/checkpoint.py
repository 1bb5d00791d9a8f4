"""Finished layers of a calibration on disk, so that an interrupted one goes on where it was."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphwright.errors import PassError
from graphwright.pass_ import Context, Pass
from graphwright.program import Program


@dataclass(frozen=True)
class Checkpoint:
    """One file per layer, written under another name first, in a folder for the same pass, program and data."""

    folder: Path

    @staticmethod
    def of(
        one: Pass, program: Program, batches: Sequence[Mapping[str, Tensor]], context: Context
    ) -> "Checkpoint | None":
        """The checkpoint of this calibration in the context's folder, or None without one."""
        if context.checkpoint is None:
            return None
        digest = hashlib.sha256(f"{one.name} {one.model_dump_json()} {context.seed}\n{program.text()}".encode())
        for batch in batches:
            for name in sorted(batch):
                digest.update(batch[name].contiguous().numpy().tobytes())
        for tensor in program.weights().values():
            digest.update(str(float(tensor.double().sum())).encode())
        folder = context.checkpoint / f"{one.name}-{digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return Checkpoint(folder)

    def has(self, name: str) -> bool:
        """Whether something is kept under this name."""
        return self._file(name).exists()

    def save(self, name: str, tensors: Mapping[str, Tensor], error: float = 0.0) -> None:
        """Writes one layer, and its error."""
        partial = self._file(name).with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, {"error": repr(error)})
        partial.replace(self._file(name))

    def load(self, name: str) -> dict[str, Tensor]:
        """Reads one layer.

        Raises:
            PassError: the file is damaged.
        """
        try:
            with safe_open(self._file(name), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PassError(
                f"The finished layer in {self._file(name)} cannot be read: {error}", where=name, fix="Delete the file"
            ) from error

    def error(self, name: str) -> float:
        """The error that was saved with a layer."""
        with safe_open(self._file(name), framework="pt") as file:
            return float(file.metadata()["error"])

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
