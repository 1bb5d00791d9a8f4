"""Export: a rewritten model in a format that other runtimes load.

    export("model.gguf", "torch-export", "model.pt2", recipe="int8")

`torch-export` is the rewritten graph as a torch.export archive; loading it needs Graphwright's ops. `aoti` is the
compiled artifact, which needs no Python modelling code. Further formats are those of backends that have a module
`exporter` with an `EXPORTER`: found by the backend's name, imported when asked for.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from graphwright import artifact, registry
from graphwright.backend import Progress
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, compile, rewrite, with_text
from graphwright.errors import BackendError, nearest
from graphwright.manager import plan_passes
from graphwright.origin import Origin
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import open_model
from graphwright.target import Target


class Exporter(Protocol):
    """Writes programs in one format."""

    name: str
    options: type[BaseModel]
    """The format's own options, all with defaults."""

    def recipe(self, recipe: Recipe, options: Any) -> Recipe:
        """The recipe as the format needs it; refuses one that the format cannot carry, before any work."""
        ...

    def write(
        self, program: Program, directory: Path, origin: Origin, options: Any, progress: Progress
    ) -> dict[str, Any]:
        """Writes the rewritten program into an existing directory; returns facts for the manifest."""
        ...

    def verify(self, program: Program, directory: Path) -> dict[str, float]:
        """Runs what was written and compares it with `program`: relative error and tokens per second."""
        ...


def formats() -> list[str]:
    """Names of all formats."""
    return sorted([*FORMATS, *registry.exporter_names()])


def export(
    model: Any,
    format: str,
    output: Path | str,
    *,
    recipe: str | Path | Recipe = "fp32",
    options: Mapping[str, Any] | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
) -> Path:
    """Rewrites `model` by `recipe` and writes it; returns what was written.

    Args:
        model: what `graphwright.compile` takes.
        format: one of `formats()`.
        output: file or directory.
        recipe: preset, YAML file or `Recipe`.
        options: the format's own, by name.
        verify: run what was written and compare it, before it is put in its place; the manifest tells the result.
        overwrite: replace what an earlier export wrote.
        progress: called with what is being done and the finished fraction.

    Raises:
        BackendError: unknown format or option, a package is missing, or the output exists and may not be overwritten.
        RecipeError: the format cannot carry what the recipe makes.
    """
    if format not in formats():
        raise BackendError(f"Unknown export format {format!r}", fix=nearest(format, formats()))
    wanted, chosen = Recipe.load(recipe), CompileOptions(progress=progress)
    if format in registry.exporter_names():
        exporter = registry.exporter(format)
        return _directory(exporter, model, Path(output), wanted, dict(options or {}), verify, overwrite, chosen)
    if options or verify:
        raise BackendError(f"Format {format} has no options and is not verified by running it", fix="Leave them out")
    return FORMATS[format](model, Path(output), wanted, overwrite, chosen)


def _directory(
    exporter: Exporter,
    model: Any,
    output: Path,
    recipe: Recipe,
    given: dict[str, Any],
    verify: bool,
    overwrite: bool,
    chosen: CompileOptions,
) -> Path:
    options = _validated(exporter, given)
    carried = exporter.recipe(recipe, options)
    plan_passes(carried)
    cpu = Target.parse("cpu")
    with artifact.atomic_directory(output, overwrite=overwrite) as work:
        source = open_model(model, keep_codes=carried.reads_codes)
        captured = capture(source.model, source.example_inputs)
        captured = captured.with_(metadata=source.described(captured.metadata))
        origin = Origin.of(source, captured)
        source.model = torch.nn.Module()  # so that weights are freed as they are rewritten
        if origin.tokenizer is not None:
            chosen = with_text(chosen, carried, captured, origin.tokenizer)
        program = rewrite(captured, carried, cpu, chosen, consume=True)
        facts = exporter.write(program, work, origin, options, chosen.progress)
        if verify:
            chosen.progress("verify", 0.9)
            facts["verified"] = exporter.verify(program, work)
        artifact.write_manifest(work, cpu, exporter.name, {**carried.to_data(), "export": facts})
    return output


def _validated(exporter: Exporter, given: Mapping[str, Any]) -> BaseModel:
    try:
        return exporter.options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = exporter.options.model_fields
            raise BackendError(f"Format {exporter.name} has no option {name!r}", fix=nearest(name, known)) from error
        raise BackendError(f"Option {name} of {exporter.name} is {first['input']!r}: {first['msg']}") from error


def _aoti(model: Any, output: Path, recipe: Recipe, overwrite: bool, options: CompileOptions) -> Path:
    return compile(model, recipe, "cpu", options=options).save(output, overwrite=overwrite)


def _torch_export(model: Any, output: Path, recipe: Recipe, overwrite: bool, options: CompileOptions) -> Path:
    if output.exists() and not overwrite:
        raise BackendError(f"{output} exists already", fix="Choose another file, or pass --force")
    source = open_model(model, keep_codes=recipe.reads_codes)
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
