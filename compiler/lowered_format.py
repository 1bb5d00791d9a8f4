"""Formats that are compiled artifacts: what `graphwright.load` runs, lowered by one backend for one target."""

from pathlib import Path
from typing import Any, ClassVar

from graphwright.backend import Coverage, Executable, backends_for, coverage
from graphwright.compiled import KERNELS, copy_tokenizer
from graphwright.export_format import Export, Format, Verified, compare
from graphwright.program import Program, load_weights
from graphwright.target import Target


class LoweredFormat(Format):
    """Base of formats that a backend compiles; a subclass names the backend and says for which target."""

    lowering: ClassVar[str]

    def write(self, export: Export) -> dict[str, Any]:
        """An artifact: program, weights, kernels and tokenizer."""
        target = self.target(export.options)
        (backend,) = backends_for(target, self.lowering)
        export.program = backend.prepare(export.program, target)
        (export.directory / KERNELS).mkdir()
        backend.compile(export.program, target, export.directory / KERNELS, export.progress)
        export.program.save(export.directory)
        copy_tokenizer(export.tokenizer, export.directory)
        return {"target": target.name}

    def verify(self, export: Export) -> Verified:
        """Loads what was written and runs it."""
        return compare(export.program, self.load(export), f"graphwright, backend {self.lowering}")

    def load(self, export: Export) -> Executable:
        """The executable from the written files alone."""
        target = self.target(export.options)
        (backend,) = backends_for(target, self.lowering)
        weights = load_weights(Path(export.directory) / "weights.safetensors")
        return backend.load(export.program.contract, weights, target, export.directory / KERNELS)

    def backend(self, program: Program) -> str:
        """The backend that made it."""
        return self.lowering

    def coverage(self, export: Export) -> Coverage:
        """The backend's own answer for every op."""
        target: Target = self.target(export.options)
        (backend,) = backends_for(target, self.lowering)
        return coverage(export.program, backend, target, export.directory / KERNELS)


__all__ = ["LoweredFormat"]
