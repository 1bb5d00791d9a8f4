"""Export: a rewritten model in a format that other runtimes load.

    export("model.gguf", "onnx", "model-onnx", recipe="int4", options={"profile": "ort"}, verify=True)

Every format is written the same way, and its directory holds beside the format's own files

    manifest.json               versions, recipe, options, and the size and SHA-256 of every file
    report.json, report.html    what each pass did, and a section on the export

A format is one file that is found by its name; see `graphwright.export_format`.
"""

import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from graphwright import artifact, registry
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite, with_calibration_text
from graphwright.errors import BackendError, nearest
from graphwright.export_format import Export, Format, FormatOptions, Verified
from graphwright.manager import plan_passes
from graphwright.origin import Origin
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.report.collect import Report, collect
from graphwright.report.html import render
from graphwright.sources import Source, open_model


def formats() -> list[str]:
    """Names of all formats."""
    return sorted(registry.format_files())


def export(
    model: Any,
    format: str,
    output: Path | str,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe = "fp32",
    options: Mapping[str, Any] | None = None,
    verify: bool = False,
    overwrite: bool = False,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
    compile_options: CompileOptions | None = None,
) -> Path:
    """Rewrites `model` by `recipe` and writes it; returns the directory.

    Args:
        model: what `graphwright.compile` takes, except a program.
        format: one of `formats()`.
        output: directory; nothing is there until all of it is.
        recipe: preset, YAML file, plain data or `Recipe`.
        options: the format's own, by name.
        verify: run what was written and compare it with the program, before it is put in its place.
        overwrite: replace what an earlier export wrote.
        example_inputs: for modules that are not language models, see `capture`.
        progress: called with what is being done and the finished fraction.
        compile_options: how to rewrite: seed, calibration, verification of the passes.

    Raises:
        BackendError: unknown format or option, a package is missing, or what was written does not compute what the
            program computes.
        ArtifactError: the output exists and may not be overwritten, or cannot be written.
        RecipeError: the format cannot carry what the recipe makes; said before a model is read.
    """
    writer = registry.export_format(format)
    chosen = validated(writer, options or {})
    writer.require(chosen, verify=verify)
    carried = writer.recipe(Recipe.load(recipe), chosen)
    plan_passes(carried)
    how = compile_options or CompileOptions(progress=progress)
    with artifact.atomic_directory(Path(output), overwrite=overwrite) as work:
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        how.progress("capture", 0.0)
        source = open_model(model, keep_codes=carried.reads_codes)
        inputs = example_inputs if example_inputs is not None else source.example_inputs
        config = _config(source.model)
        program = capture(source.model, inputs)
        program = program.with_(metadata=source.described(program.metadata))
        origin = Origin.of(source.model, program)
        source.model = torch.nn.Module()  # so that weights are freed as they are rewritten
        seconds["capture"] = time.perf_counter() - started
        job = Export(program, work, carried, chosen, config, _tokenizer(source), how.progress, origin)
        before = program.shape_only()
        del program
        _write(writer, job, how, before, seconds, verify)
    return Path(output)


def _write(
    writer: Format, job: Export, how: CompileOptions, before: Program, seconds: dict[str, float], verify: bool
) -> None:
    """Rewriting, the format's own files, verification, report and manifest."""
    target = writer.target(job.options)
    started = time.perf_counter()
    how = with_calibration_text(how, job.recipe, job.program, job.tokenizer)
    job.program = rewrite(job.program, job.recipe, target, how, consume=True)
    rewritten = time.perf_counter()
    job.progress(f"write {writer.name}", 0.6)
    facts = writer.write(job)
    seconds |= {"rewrite": rewritten - started, "write": time.perf_counter() - rewritten}
    backend = writer.backend(job.program)
    report = collect(
        before,
        job.program,
        recipe=job.recipe,
        target=target,
        backend=backend or writer.name,
        coverage=writer.coverage(job).to_json(),
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    described = {"format": writer.name, "options": job.options.model_dump(mode="json"), **facts, "verified": None}
    if verify:
        # Last: a format may use the program up, to have room for what it has written.
        described["verified"] = _verified(writer, job, report.seconds).to_json()
    files = {str(f.relative_to(job.directory)): f.stat().st_size for f in _files(job.directory)}
    report.export = {**described, "files": files}
    report.artifact_bytes = sum(files.values())
    report.save(job.directory / "report.json")
    (job.directory / "report.html").write_text(render(report))
    builder = report.coverage["builder"]
    artifact.write_manifest(job.directory, target, backend, job.recipe.to_data(), export=described, builder=builder)


def _verified(writer: Format, job: Export, seconds: dict[str, float]) -> Verified:
    job.progress("verify", 0.9)
    started = time.perf_counter()
    found = writer.verify(job)
    seconds["verify"] = time.perf_counter() - started
    if not found.relative_error <= found.limit:
        raise BackendError(
            f"The exported model does not compute what the program computes: its error is {found.relative_error:.3g}, "
            f"and rounding explains {found.limit:g}",
            where=f"format {writer.name}, run on {found.runtime}",
            fix="Nothing was written. This is a defect of the export",
        )
    return found


def validated(writer: Format, given: Mapping[str, Any]) -> FormatOptions:
    """The format's options from names and values.

    Raises:
        BackendError: an unknown name, with the nearest right one, or a value that is out of bounds.
    """
    try:
        return writer.options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = writer.options.model_fields
        if first["type"] == "extra_forbidden":
            fix = nearest(name, known) if known else "It has no options"
            raise BackendError(f"Format {writer.name} has no option {name!r}", fix=fix) from error
        what = f"Option {name} of {writer.name} is {first['input']!r}" if name else f"Options of {writer.name}"
        raise BackendError(f"{what}: {first['msg'].removeprefix('Value error, ')}") from error


def _config(model: Any) -> dict[str, Any] | None:
    """The configuration of a Hugging Face model as plain data."""
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _tokenizer(source: Source) -> Path | None:
    return Path(source.tokenizer_directory) if source.tokenizer_directory else None


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


__all__ = ["Report", "export", "formats", "validated"]
