"""The compiler's one chain, and what it returns.

compiled = compile(model, recipe="int4", target="cpu")
print(compiled.generate("The capital of France is", max_new_tokens=20).texts[0])
compiled.save("smollm2-int4")
compiled = load("smollm2-int4")
"""

import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graphwright import artifact, registry
from graphwright.backend import Executable, Progress, backends_for, choose, coverage, required_backend, tuned
from graphwright.calibration import LENGTH, SAMPLES, from_text
from graphwright.capture import DimNames, capture
from graphwright.engine.generate import GenerationResult, Generator
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import ArtifactError
from graphwright.feeding import token_inputs
from graphwright.held_out import HeldOutText
from graphwright.manager import Observer, PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program, load_weights
from graphwright.recipe import Recipe
from graphwright.report.collect import Report, collect
from graphwright.report.html import render
from graphwright.rewrite import Fuel
from graphwright.sources import open_model
from graphwright.target import Target, local_gpu

KERNELS, TOKENIZER = "kernels", "tokenizer"


def _silent(_text: str, _fraction: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class CompileOptions:
    """How to compile, besides what to do.

    Attributes:
        backend: the backend's name; empty for the target's own.
        verify: compare numbers after every pass.
        seed: seeds everything random.
        calibration: inputs by name, or token batches, on which calibrated passes measure activations and approximate
            passes are judged; see `graphwright.calibration.from_tokens`.
        calibration_text: text for calibrated passes where `calibration` is empty and the model has a tokenizer; empty
            for the part of the built-in text that evaluation does not use.
        calibration_samples: windows of the text.
        calibration_length: tokens per window.
        checkpoint: folder for the finished layers of calibrated passes, so that an interrupted compile goes on.
        dump: directory for the text of every stage.
        observers: called after each pass.
        progress: called with what is being done and the finished fraction.
        fuel: the number of rewrites that may happen, None for all.
        evaluate: windows of held-out text on which the compiled program is compared with the captured one for the
            report, where it runs on this machine and the model has a tokenizer.
        lengths: lengths of held-out texts over which perplexity is measured for the report, of the compiled program
            and, as far as its context goes, of the captured one; needs a tokenizer and this machine as the target.
        tune: seconds for which schedules of kernels are measured, on this machine, before they are compiled.
        also: more targets of the same backend to compile for, into one artifact.
    """

    backend: str = ""
    verify: bool = True
    seed: int = 0
    calibration: tuple[dict[str, Tensor], ...] = ()
    calibration_text: str = ""
    calibration_samples: int = SAMPLES
    calibration_length: int = LENGTH
    checkpoint: Path | None = None
    dump: Path | None = None
    observers: tuple[Observer, ...] = ()
    progress: Progress = _silent
    fuel: int | None = None
    evaluate: int = 0
    lengths: tuple[int, ...] = ()
    tune: float = 0.0
    also: tuple[str, ...] = ()


def rewrite(
    program: Program,
    recipe: Recipe,
    target: Target,
    options: CompileOptions | None = None,
    *,
    consume: bool = False,
) -> Program:
    """Raises `program` and runs the recipe's passes over it; unless `consume`, `program` itself is not changed.

    Raises:
        PassError: a pass failed, or broke what it promises.
    """
    options = options or CompileOptions()
    context = Context(
        target=target,
        seed=options.seed,
        fuel=Fuel(options.fuel),
        calibration=list(options.calibration),
        checkpoint=options.checkpoint,
        progress=options.progress,
    )
    manager = PassManager(context, recipe.budget, verify=options.verify, observers=options.observers, dump=options.dump)
    return manager.run(program, plan_passes(recipe, program), consume=consume)


def compile(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = "fp32",
    target: str | Target = "cpu",
    *,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dims: DimNames | None = None,
    options: CompileOptions | None = None,
    **changes: Any,
) -> "Compiled":
    """Captures, raises, rewrites and lowers a model.

    Args:
        model: an `nn.Module`, a `Program`, or what `graphwright.sources.open_model` reads: a Hugging Face directory,
            a GGUF file, a hub id, or `package.module:factory`.
        recipe: a preset's name, a YAML file, plain data, or a `Recipe`.
        target: a target's name.
        example_inputs: for modules that are not language models, see `capture`.
        dims: symbolic dimensions, see `capture`.
        options: how to compile.
        **changes: single fields of `options`, such as `verify=False`.

    Raises:
        GraphwrightError: the model, recipe or target is wrong, or a stage failed. Nothing is written.
    """
    options = replace(options or CompileOptions(), **changes)
    wanted = Recipe.load(recipe)
    machine = target if isinstance(target, Target) else Target.parse(target)
    others = [Target.parse(name) for name in dict.fromkeys(options.also) if name != machine.name]
    required_backend(machine, options.backend)
    for other in others:
        for candidate in backends_for(machine, options.backend):
            required_backend(other, candidate.name)
    plan_passes(wanted)
    workspace = tempfile.TemporaryDirectory(prefix="graphwright-")
    folder = Path(workspace.name)
    seconds: dict[str, float] = {}
    with _timed(seconds, "capture"):
        options.progress("capture", 0.0)
        if isinstance(model, Program):
            captured = model
        else:
            source = open_model(model, keep_codes=wanted.reads_codes)
            copy_tokenizer(source.tokenizer_directory, folder)
            inputs = example_inputs if example_inputs is not None else source.example_inputs
            captured = capture(source.model, inputs, dims=dims)
            captured = captured.with_(metadata=source.described(captured.metadata))
            # The caller may hold the model; the compiler must not, or its weights would outlive their rewriting.
            del source
    options = with_calibration_text(options, wanted, captured, folder / TOKENIZER)
    texts = HeldOutText(folder / TOKENIZER, options.evaluate, options.lengths, options.progress)
    texts.measure_original(captured, here=machine.here)
    with _timed(seconds, "rewrite"):
        before = captured.shape_only()
        # A program that the caller gave stays as it is; one captured here is used up, to free weights early.
        mine = not isinstance(model, Program)
        del model
        rewritten = rewrite(captured, wanted, machine, options, consume=mine)
        del captured
    texts.require_context(rewritten)
    with _timed(seconds, "lower"):
        lowering, passed_over = choose(rewritten, machine, backends_for(machine, options.backend))
        lowering = tuned(lowering, options.tune)
        kernels = folder / KERNELS
        kernels.mkdir()
        rewritten = lowering.prepare(rewritten, machine)
        executable = lowering.compile(rewritten, machine, kernels, options.progress)
        for other in others:
            lowering.compile(rewritten, other, kernels, options.progress)
    report = collect(
        before,
        rewritten,
        recipe=wanted,
        target=machine,
        backend=lowering.name,
        coverage=replace(coverage(rewritten, lowering, machine, kernels), passed_over=passed_over).to_json(),
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    also = tuple(other.name for other in others)
    compiled = Compiled(rewritten, executable, machine, lowering.name, wanted, folder, report, also, workspace)
    texts.measure(compiled, report)
    return compiled


def copy_tokenizer(tokenizer: Path | str | None, folder: Path) -> None:
    """The tokenizer's files, if there are any, where an artifact has them."""
    if tokenizer:
        shutil.copytree(tokenizer, folder / TOKENIZER)


def with_calibration_text(
    options: CompileOptions, recipe: Recipe, program: Program, tokenizer: Path | None
) -> CompileOptions:
    """Options with windows of the calibration text, if a pass wants them and nothing else was given."""
    if options.calibration or not any(one.calibrates for one in recipe.passes):
        return options
    if tokenizer is None or not tokenizer.is_dir():
        return options
    length = min(options.calibration_length, program.metadata.context_length or options.calibration_length)
    windows = from_text(tokenizer, options.calibration_text or None, options.calibration_samples, length)
    return replace(options, calibration=tuple(windows))


def load(directory: Path | str, *, target: str | Target | None = None) -> "Compiled":
    """Loads a saved artifact; needs neither `transformers` nor the model's code.

    Args:
        directory: of the artifact.
        target: what to run it on; by default this machine's GPU, if the artifact was made for GPUs, or its CPU.

    Raises:
        TargetError: the artifact is for a GPU that this machine does not have.
        ArtifactError: the artifact is damaged, or was made for another target or version.
    """
    folder = Path(directory)
    manifest = artifact.read_manifest(folder)
    if not manifest.backend:
        raise ArtifactError(
            f"{folder} is an export in the format {manifest.export.get('format', '?')}, which other runtimes load",
            fix="Compile the model with graphwright compile, or export it with --format aoti",
        )
    machine = target if isinstance(target, Target) else Target.parse(target or _target_here(manifest))
    artifact.verify(folder, machine)
    weights = load_weights(folder / "weights.safetensors")
    # The backend comes first: the program may be made of ops that it defines.
    lowering = registry.backend(manifest.backend)
    program = Program.load(folder, weights)
    executable = lowering.load(program.contract, program.weights(), machine, folder / KERNELS)
    report = Report.load(folder / "report.json")
    recipe = Recipe.load(manifest.recipe)
    also = tuple(name for name in manifest.targets if name != machine.name)
    return Compiled(program, executable, machine, manifest.backend, recipe, folder, report, also)


def _target_here(manifest: artifact.Manifest) -> str:
    """The artifact's target that is this machine, or its first, whose backend will say what is missing."""
    gpu = local_gpu()
    return gpu if gpu in manifest.targets else manifest.target


@dataclass
class Compiled:
    """A compiled program with its weights, ready to run, generate and be saved."""

    program: Program
    executable: Executable
    target: Target
    backend: str
    recipe: Recipe
    folder: Path
    report: Report
    also: tuple[str, ...] = ()
    _workspace: Any = field(default=None, repr=False)
    _generator: Generator | None = field(default=None, repr=False)

    def __call__(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the program once; inputs and state by name, state is written in place.

        Raises:
            GraphwrightError: a missing input, or one of the wrong dtype or shape.
        """
        self.program.contract.check(tensors)
        return self.executable(tensors)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, vocabulary] of one whole forward over tokens with right padding."""
        return self(**token_inputs(self.program, input_ids, attention_mask))[0]

    @property
    def generator(self) -> Generator:
        """The engine over this program."""
        if self._generator is None:
            folder = self.folder / TOKENIZER
            tokenizer = Tokenizer(folder) if folder.is_dir() else None
            self._generator = Generator(self.executable, self.program.contract, self.program.metadata, tokenizer)
        return self._generator

    def generate(self, prompts: Any, **options: Any) -> GenerationResult:
        """Continues prompts; see `graphwright.engine.generate.Generator.generate`."""
        return self.generator.generate(prompts, **options)

    def stream(self, prompt: Any, **options: Any) -> Iterator[Any]:
        """Continues one prompt, piece by piece; see `Generator.stream`."""
        return self.generator.stream(prompt, **options)

    def save(self, directory: Path | str, *, overwrite: bool = False) -> Path:
        """Writes the artifact, all of it or nothing.

        Raises:
            ArtifactError: the directory exists and may not be overwritten, or cannot be written.
        """
        final = Path(directory)
        with artifact.atomic_directory(final, overwrite=overwrite) as work:
            self.program.save(work)
            for part in (KERNELS, TOKENIZER):
                if (self.folder / part).is_dir():
                    shutil.copytree(self.folder / part, work / part)
            self.report.artifact_bytes = sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
            self.report.save(work / "report.json")
            (work / "report.html").write_text(render(self.report))
            builder = self.report.coverage.get("builder", "")
            recipe = self.recipe.to_data()
            artifact.write_manifest(work, self.target, self.backend, recipe, self.also, builder=builder)
        return final


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


__all__ = ["CompileOptions", "Compiled", "compile", "load", "rewrite"]
