"""Export: a rewritten model in a format that other runtimes load.

    export("model.gguf", "torch-export", "model.pt2", recipe="int8")

`torch-export` is the rewritten graph as a torch.export archive; loading it needs Graphwright's ops. `aoti` is the
compiled artifact, which needs no Python modelling code. Further formats are backends that plug in here.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.capture import capture
from graphwright.compiled import CompileOptions, compile, rewrite
from graphwright.errors import BackendError, nearest
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import open_model
from graphwright.target import Target


def export(
    model: Any,
    format: str,
    output: Path | str,
    *,
    recipe: str | Path | Recipe = "fp32",
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
) -> Path:
    """Rewrites `model` by `recipe` and writes it; returns what was written.

    Raises:
        BackendError: unknown format, or the file exists and may not be overwritten.
    """
    if format not in FORMATS:
        raise BackendError(f"Unknown export format {format!r}", fix=nearest(format, FORMATS))
    return FORMATS[format](model, Path(output), Recipe.load(recipe), overwrite, CompileOptions(progress=progress))


def _aoti(model: Any, output: Path, recipe: Recipe, overwrite: bool, options: CompileOptions) -> Path:
    return compile(model, recipe, "cpu", options=options).save(output, overwrite=overwrite)


def _torch_export(model: Any, output: Path, recipe: Recipe, overwrite: bool, options: CompileOptions) -> Path:
    if output.exists() and not overwrite:
        raise BackendError(f"{output} exists already", fix="Choose another file, or pass --force")
    source = open_model(model)
    program = rewrite(capture(source.model, source.example_inputs), recipe, Target.parse("cpu"), options)
    archive = exported_program(program)
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".pt2", dir=output.parent)
    os.close(handle)
    try:
        torch.export.save(archive, temporary)
        os.replace(temporary, output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return output


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


FORMATS = {"torch-export": _torch_export, "aoti": _aoti}
"""Writers by format name."""
