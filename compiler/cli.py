"""The command line: compile, run, eval, bench, inspect, export, bisect, and lists of what there is.

Every command ends in a summary or, with `--json`, in one JSON document on standard output. Progress and messages go to
standard error. A mistake of the user's is one paragraph and an exit code; `--debug` adds the traceback.
"""

import ctypes
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import graphwright
from graphwright import accuracy, exporting, recipe, registry, speed
from graphwright import bisect as bisection
from graphwright import doctor as health
from graphwright.artifact import MANIFEST, read_manifest
from graphwright.artifact import verify as verify_artifact
from graphwright.backend import KernelLister
from graphwright.calibration import LENGTH, SAMPLES, read_text
from graphwright.capture import capture
from graphwright.compiled import KERNELS, Compiled, CompileOptions, rewrite
from graphwright.engine.generate import PROMPT_LOOKUP
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import GraphwrightError
from graphwright.feeding import logits_of
from graphwright.program import Program
from graphwright.report.collect import Report
from graphwright.report.terminal import print_report
from graphwright.sources import open_model
from graphwright.target import Target, known_targets

M_MMAP_THRESHOLD = -3

EVALUATED_WINDOWS = 4
"""Windows of held-out text on which a compile measures accuracy; `graphwright eval` takes more."""

app = typer.Typer(
    help="Make a large language model smaller and faster on your own hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
messages = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hugging Face directory, GGUF file, hub id, or package.module:factory")]
ArtifactPath = Annotated[Path, typer.Argument(help="Directory of a compiled artifact")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Preset or YAML file; see `graphwright recipes`")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="See `graphwright targets`")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves the number to PyTorch")]


@app.command()
def compile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the artifact")],
    recipe: RecipeName = "int4",
    target: TargetName = "cpu",
    also: Annotated[
        list[str] | None, typer.Option(help="One more target in the same artifact; may be repeated")
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend; the target's own by default")] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an artifact that is there")] = False,
    verify: Annotated[bool, typer.Option(help="Compare numbers after every pass")] = True,
    measure: Annotated[bool, typer.Option(help="Measure speed and accuracy for the report")] = True,
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=2, help="Perplexity at this length of text; may be repeated")
    ] = None,
    tune: Annotated[float, typer.Option(min=0, help="Seconds for measuring schedules of kernels; 0: defaults")] = 0.0,
    dump: Annotated[Path | None, typer.Option(help="Write the graph's text after every pass here")] = None,
    seed: Annotated[int, typer.Option(help="Seeds everything random")] = 0,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on; built-in text otherwise")] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Windows of the calibration text")] = SAMPLES,
    calibration_length: Annotated[int, typer.Option(min=2, help="Tokens per window")] = LENGTH,
    checkpoint: Annotated[Path | None, typer.Option(help="Keep finished layers here; run again to go on")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL ahead of time into an artifact."""
    # Refused before hours of work, not after.
    if output.exists() and not force and any(output.iterdir()):
        raise GraphwrightError(f"{output} exists already", fix="Choose another directory, or pass --force")
    with _progress() as progress:
        options = CompileOptions(
            backend=backend,
            verify=verify,
            seed=seed,
            calibration_text=read_text(calibration) if calibration else "",
            calibration_samples=calibration_samples,
            calibration_length=calibration_length,
            checkpoint=checkpoint,
            evaluate=EVALUATED_WINDOWS if measure else 0,
            lengths=tuple(lengths or ()),
            tune=tune,
            dump=dump,
            progress=progress,
            also=tuple(also or ()),
        )
        compiled = graphwright.compile(model, recipe, target, options=options)
        if measure and compiled.program.contract.state and compiled.target.here:
            compiled.report.speed = _speed(compiled, progress=progress).to_json()
    compiled.save(output, overwrite=force)
    if as_json:
        _print_json(compiled.report.to_json())
        return
    print_report(compiled.report, console)
    console.print(f"Artifact: [bold]{escape(str(output))}[/]  Report: {escape(str(output / 'report.html'))}")


@app.command()
def run(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Argument(help="Prompt; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is all")] = 0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template")] = False,
    draft: Annotated[
        str, typer.Option(help="Guess tokens and check them: prompt-lookup, or a cheaper artifact of the same model")
    ] = "",
    draft_tokens: Annotated[int, typer.Option(help="Guesses that are checked at once")] = 5,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with a compiled ARTIFACT, streaming."""
    _set_threads(threads)
    compiled = graphwright.load(artifact)
    text = sys.stdin.read() if prompt == "-" else prompt
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "chat": chat,
        "draft_tokens": draft_tokens,
    }
    if draft:
        options["draft"] = draft if draft == PROMPT_LOOKUP else graphwright.load(draft)
    if as_json:
        _print_json(asdict(compiled.generate(text, **options)))
        return
    for piece in compiled.stream(text, **options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def eval(
    artifact: ArtifactPath,
    model: Annotated[str, typer.Option(help="The original, to compare with; see compile's MODEL")] = "",
    text: Annotated[Path | None, typer.Option(help="Text file; default: documentation that ships with Python")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window", min=2)] = 256,
    windows: Annotated[int, typer.Option(help="Number of windows", min=1)] = 16,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on held-out text and, with --model, divergence from the original."""
    _set_threads(threads)
    compiled = graphwright.load(artifact)
    tokens, source = _text_tokens(compiled, text)
    reference = _reference(model) if model else None
    with _progress() as progress:
        batch = accuracy.token_windows(tokens, window, windows)
        result = accuracy.measure(compiled.logits, batch, reference=reference, text=source, progress=progress)
    if as_json:
        _print_json(result.to_json())
        return
    _print_facts("Accuracy", result.to_json())


@app.command()
def bench(
    artifact: ArtifactPath,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Measure prefill and decode speed of a compiled ARTIFACT on this machine."""
    _set_threads(threads)
    compiled = graphwright.load(artifact)
    with _progress() as progress:
        result = _speed(compiled, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, progress=progress)
    if as_json:
        _print_json(result.to_json())
        return
    _print_facts("Speed (medians)", result.to_json())


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Artifact directory, or a model as in compile")],
    graph: Annotated[bool, typer.Option(help="Print the graph")] = False,
    raised: Annotated[bool, typer.Option(help="A model: print it after raising")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="An artifact: list its compiled kernels")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what an artifact or a model holds: contract, history, ops, graph, kernels."""
    if (Path(path) / MANIFEST).is_file():
        _inspect_artifact(Path(path), graph, kernels, as_json)
        return
    if kernels:
        raise GraphwrightError(f"{path} is no artifact, so it has no compiled kernels", fix="Compile it first")
    program = capture_named(path)
    if raised:
        program = rewrite(program, recipe.Recipe.load("none"), Target.parse("cpu"))
    _show(program, graph, as_json)


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write")],
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"One of {', '.join(exporting.formats())}")
    ] = "torch-export",
    recipe: RecipeName = "fp32",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "--set", help="Option of the format, as name=value; see `graphwright formats`"),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run what was written: error and tokens/s")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there")] = False,
    check: Annotated[bool, typer.Option(help="Compare numbers after every pass")] = True,
    seed: Annotated[int, typer.Option(help="Seeds everything random")] = 0,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on; built-in text otherwise")] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Windows of the calibration text")] = SAMPLES,
    calibration_length: Annotated[int, typer.Option(min=2, help="Tokens per window")] = LENGTH,
    checkpoint: Annotated[Path | None, typer.Option(help="Keep finished layers here; run again to go on")] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite MODEL and write it in a format that other runtimes load."""
    with _progress() as progress:
        written = exporting.export(
            model,
            format,
            output,
            recipe=recipe,
            options=_settings(option or []),
            verify=verify,
            overwrite=force,
            compile_options=CompileOptions(
                verify=check,
                seed=seed,
                calibration_text=read_text(calibration) if calibration else "",
                calibration_samples=calibration_samples,
                calibration_length=calibration_length,
                checkpoint=checkpoint,
                progress=progress,
            ),
        )
    report = Report.load(written / "report.json")
    if as_json:
        _print_json({"output": str(written), **report.to_json()})
        return
    print_report(report, console)
    console.print(f"Written: [bold]{escape(str(written))}[/]  Report: {escape(str(written / 'report.html'))}")


@app.command()
def formats(as_json: AsJson = False) -> None:
    """List the export formats with their options."""
    rows = [row for name in exporting.formats() for row in _format_rows(name)]
    _print_rows("Export formats", rows, as_json)


def _format_rows(name: str) -> list[dict[str, Any]]:
    """One row per option of a format; one that says what to install where a package is missing."""
    try:
        fields = registry.export_format(name).options.model_fields
    except GraphwrightError as error:
        return [{"format": name, "option": "", "default": "", "what it does": str(error)}]
    rows = [(key, str(field.default), field.description or "") for key, field in fields.items()]
    return [
        {"format": name, "option": key, "default": default, "what it does": text}
        for key, default, text in rows or [("", "", "no options")]
    ]


@app.command()
def bisect(
    model: Model,
    recipe_name: RecipeName = "int4",
    target: TargetName = "cpu",
    kl: Annotated[float, typer.Option(help="Largest mean KL divergence, in nats, that counts as good")] = 0.1,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the first rewrite of a recipe that moves the logits by more than --kl."""
    wanted, machine = recipe.Recipe.load(recipe_name), Target.parse(target)
    program = capture_named(model, keep_codes=wanted.reads_codes)
    with _progress() as progress:
        options = CompileOptions(seed=seed, progress=progress)
        culprit = bisection.bisect(program, wanted, machine, bisection.kl_test(program, kl, seed), options)
    if as_json:
        _print_json(asdict(culprit) if culprit else None)
    elif culprit is None:
        console.print(f"The whole recipe stays within {kl:g} nats: there is nothing to bisect.")
    else:
        _print_facts("First bad rewrite", asdict(culprit))


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List every pass with its kind, options and source."""
    rows = [
        {
            "pass": name,
            "kind": cls.kind,
            "options": ", ".join(f"{key}={field.default}" for key, field in cls.model_fields.items()),
            "requires": ", ".join(cls.requires),
            "provides": ", ".join(cls.provides),
            "paper": str(cls.paper or ""),
        }
        for name, cls in registry.all_passes().items()
    ]
    _print_rows("Passes", rows, as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    loaded = [recipe.Recipe.load(name) for name in recipe.presets()]
    rows = [
        {"recipe": r.name, "description": r.description, "passes": " → ".join(p.spec() for p in r.passes)}
        for r in loaded
    ]
    _print_rows("Recipes", rows, as_json)


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the targets and the backend that serves each."""
    rows = []
    for name in known_targets():
        target = Target.parse(name)
        rows.append(
            {
                "target": name,
                "backend": ", ".join(target.backends) or "none in this version",
                "memory": f"{target.memory_bytes / 2**30:.0f} GiB",
                "bandwidth": f"{target.bandwidth / 1e9:.0f} GB/s",
                "features": " ".join(target.features),
            }
        )
    _print_rows("Targets", rows, as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this installation and machine, and say what to do about what is missing."""
    findings = health.examine()
    _print_rows("Doctor", [asdict(finding) for finding in findings], as_json)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def capture_named(model: str, *, keep_codes: bool = False) -> Program:
    """Captures what a user names on the command line."""
    source = open_model(model, keep_codes=keep_codes)
    return capture(source.model, source.example_inputs)


def main() -> None:
    """Entry point: runs the app and turns errors into paragraphs and exit codes."""
    _return_freed_memory()
    # So that a process that is told to end removes what it has half-written, as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except GraphwrightError as error:
        if debug:
            raise
        messages.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        messages.print("interrupted")
        sys.exit(130)


def _return_freed_memory() -> None:
    """Tells glibc to give tensors of a megabyte and more back when they are freed.

    Otherwise it keeps them, and a compile's memory grows by the size of what the passes have replaced.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _speed(compiled: Compiled, **options: Any) -> speed.Speed:
    metadata = compiled.program.metadata
    longest = metadata.context_length
    options["prompt_tokens"] = min(options.get("prompt_tokens", 512), longest // 2)
    options["new_tokens"] = min(options.get("new_tokens", 64), longest // 4)
    return speed.measure(compiled.executable, compiled.program.contract, metadata.vocab_size, **options)


def _text_tokens(compiled: Compiled, text: Path | None) -> tuple[list[int], str]:
    folder = compiled.folder / "tokenizer"
    if not folder.is_dir():
        raise GraphwrightError(
            "The artifact has no tokenizer, so text cannot be scored", fix="Compile a model with one"
        )
    content = read_text(text) if text else accuracy.built_in_text(held_out=True)
    return Tokenizer(folder).encode(content), str(text) if text else accuracy.HELD_OUT_TEXT


def _reference(model: str) -> accuracy.Logits:
    program = capture_named(model)
    return lambda ids: logits_of(program, ids)


def _settings(given: list[str]) -> dict[str, Any]:
    """`name=value` pairs, with values as YAML reads them."""
    pairs = [entry.partition("=") for entry in given]
    for name, equals, _ in pairs:
        if not equals:
            raise GraphwrightError(f"--option takes name=value, not {name!r}")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _set_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def _inspect_artifact(folder: Path, graph: bool, kernels: bool, as_json: bool) -> None:
    """Reads an artifact without running it, so that any machine can look into it."""
    manifest = read_manifest(folder)
    verify_artifact(folder, Target.parse(manifest.target))
    # The backend comes first: the program may be made of ops that it defines.
    backend = registry.backend(manifest.backend)
    if kernels:
        if not isinstance(backend, KernelLister):
            raise GraphwrightError(f"Backend {manifest.backend} keeps no list of kernels")
        _print_rows("Kernels", backend.kernels(folder / KERNELS), as_json)
    elif graph or as_json:
        _show(Program.load(folder), graph, as_json)
    else:
        print_report(Report.load(folder / "report.json"), console)


def _show(program: Program, graph: bool, as_json: bool) -> None:
    if as_json:
        _print_json(program.to_json())
    elif graph:
        console.print(program.text(), markup=False, highlight=False, soft_wrap=True)
    else:
        _print_facts(program.metadata.name, {**asdict(program.metadata), "nodes": len(program.graph.nodes)})


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), escape(shown))
    console.print(table)


def _print_rows(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console.print(table)


@contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar on standard error, as the callback that compile stages take."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True) as bar:
        task = bar.add_task("start", total=1.0)

        def update(text: str, fraction: float) -> None:
            bar.update(task, description=escape(text) or "done", completed=fraction)

        yield update
