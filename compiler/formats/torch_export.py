"""The format `torch-export`: the rewritten graph as a torch.export archive, which PyTorch loads with our ops.

graphwright export MODEL --format torch-export --recipe int8 -o DIR

    import graphwright.ops
    program = torch.export.load("DIR/model.pt2")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.export_format import Export, Format, Verified, compare
from graphwright.program import Program

FILE = "model.pt2"


class TorchExport(Format):
    """Writes `model.pt2`."""

    name = "torch-export"

    def write(self, export: Export) -> dict[str, Any]:
        """The archive; inputs are the contract's in order, and state is written in place."""
        export.progress("torch.export", 0.7)
        archive = exported_program(export.program)
        export.progress("write", 0.9)
        torch.export.save(archive, export.directory / FILE)
        return {"inputs": list(export.program.contract.names), "outputs": list(export.program.contract.outputs)}

    def verify(self, export: Export) -> Verified:
        """Loads the archive and runs it eagerly."""
        module = torch.export.load(export.directory / FILE).module(check_guards=False)
        names = export.program.contract.names

        def run(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(module(*(tensors[name] for name in names)))

        return compare(export.program, run, f"torch {torch.__version__}, eager")


def exported_program(program: Program) -> torch.export.ExportedProgram:
    """The program as a torch.export program over its inputs and state, in the contract's order."""
    contract = program.contract
    symbols = {d.name: torch.export.Dim(d.name, min=d.min, max=d.max) for d in contract.dims}
    sizes = contract.sizes({"sequence": 7, "keys": 11, "capacity": 17})
    inputs: dict[str, Tensor] = {**contract.draw(sizes), **contract.allocate(sizes)}
    shapes = {s.name: s.shape for s in (*contract.inputs, *contract.state)}
    dynamic = tuple(
        {axis: symbols[dim] for axis, dim in enumerate(shapes[name]) if isinstance(dim, str)} for name in contract.names
    )
    with torch.no_grad():
        return torch.export.export(
            program.module, tuple(inputs[name] for name in contract.names), dynamic_shapes=dynamic, strict=False
        )


def load(directory: Path | str) -> torch.export.ExportedProgram:
    """The archive of an export; our ops are there once this module is imported."""
    return torch.export.load(Path(directory) / FILE)


FORMAT = TorchExport()
