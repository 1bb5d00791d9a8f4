"""What an export format is: validated options, the recipe it can carry, one method that writes and one that runs.

    class Safetensors(Format):
        '''Weights alone.'''

        name = "safetensors"
        options = SafetensorsOptions           # a FormatOptions: typed fields, unknown keys refused

        def write(self, export):
            save_file(export.program.weights(), export.directory / "model.safetensors")
            return {"tensors": len(export.program.weights())}

A format is one file, and is found by its name: `graphwright/formats/<name>.py`, with `_` for `-`, or
`graphwright/backends/<name>/exporter.py` where a backend does the work. Either defines `FORMAT`, and imports the
packages that it needs at its top: where one is missing, the error names the extra `graphwright[<name>]`.

`exporting.export` does the rest for all of them, in this order: options are validated; `require` and `recipe` refuse
what cannot be done or carried, before a model is read; capture and rewriting; `write` into a temporary directory;
`verify`, if asked for; report and manifest; and one rename. Whatever fails or is interrupted leaves nothing behind.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from graphwright import speed
from graphwright.backend import Coverage, Executable, Progress
from graphwright.errors import BackendError
from graphwright.feeding import token_inputs
from graphwright.numerics import outputs_error, tolerance
from graphwright.ops import quantize_dequantize
from graphwright.origin import Origin
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target
from graphwright.text import op_name

ROUNDED_LIMIT = 0.25
"""Largest error that counts as rounding where activations are rounded: a last bit may move one to the next code."""


class FormatOptions(BaseModel):
    """Options of a format: fields with defaults and descriptions. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass
class Export:
    """One export on its way, as a format's methods get it.

    Attributes:
        program: rewritten by `recipe`.
        directory: exists, and becomes the output when everything went well.
        recipe: as the format's `recipe` returned it.
        options: the format's own, validated.
        config: of a Hugging Face model, as its config.json has it; None for other modules.
        tokenizer: directory that holds the tokenizer's files and nothing else, or None.
        progress: called with what is being done and the finished fraction.
        origin: the model's parts by name, for formats that write its own modules.
    """

    program: Program
    directory: Path
    recipe: Recipe
    options: Any
    config: dict[str, Any] | None
    tokenizer: Path | None
    progress: Progress
    origin: Origin = field(default_factory=Origin)


@dataclass(frozen=True)
class Verified:
    """What running the exported model has shown.

    Attributes:
        relative_error: the largest of any output against the program; see `numerics.relative_error`.
        tokens_per_second: of greedy decoding, one sequence; None where nothing is decoded.
        runtime: what it ran on.
        limit: the largest error that rounding explains.
    """

    relative_error: float
    tokens_per_second: float | None
    runtime: str
    limit: float

    def to_json(self) -> dict[str, Any]:
        """Plain data for manifest and report."""
        return asdict(self)


class Format:
    """Base of all formats. Class variables say what it is; only `write` has to be defined."""

    name: ClassVar[str]
    options: ClassVar[type[FormatOptions]] = FormatOptions

    def require(self, options: Any, *, verify: bool) -> None:
        """Refuses, before any work, what cannot be done here.

        Raises:
            GraphwrightError: a package, a runtime or a device is missing; says what to do.
        """

    def recipe(self, recipe: Recipe, options: Any) -> Recipe:
        """The recipe as the format needs it.

        Raises:
            RecipeError: the format cannot carry what the recipe makes; it says what it can.
        """
        return recipe

    def target(self, options: Any) -> Target:
        """What the passes are told to rewrite for."""
        return Target.parse("cpu")

    def write(self, export: Export) -> dict[str, Any]:
        """Writes everything but manifest and report; returns facts about it, as plain data.

        Raises:
            BackendError: the program holds what the format cannot carry.
        """
        raise NotImplementedError(f"format {self.name} defines no write method")

    def verify(self, export: Export) -> Verified:
        """Runs what was written and compares it with `export.program`, which nothing needs afterwards.

        Raises:
            BackendError: it cannot be run here; what is missing is named.
        """
        raise BackendError(f"Nothing here runs models of format {self.name}", fix="Export without --verify")

    def backend(self, program: Program) -> str:
        """The backend that `graphwright.load` runs the directory with; empty if other runtimes run it."""
        return ""

    def coverage(self, export: Export) -> Coverage:
        """What of the program the format carries itself, for the report."""
        counts = Counter(op_name(node.target) for node in export.program.calls())
        return Coverage(lowered=dict(counts))


def compare(program: Program, run: Executable, runtime: str) -> Verified:
    """Runs an executable over the program's own contract: error against the program, state included, and speed."""
    worst = 0.0
    for length in (7, 1):
        mine, theirs = (_inputs(program, length) for _ in range(2))
        outputs = program(**mine)
        worst = max(worst, outputs_error(run(theirs), outputs, mine))
        held = [spec.name for spec in program.contract.state]
        # What lies in the last slot is what padding was written to: it is nobody's.
        found, expected = (tuple(inputs[name][:, :, :-1] for name in held) for inputs in (theirs, mine))
        worst = max(worst, outputs_error(found, expected, {}))
    return Verified(worst, _tokens_per_second(program, run), runtime, error_limit(program, outputs))


def error_limit(program: Program, outputs: tuple[Tensor, ...]) -> float:
    """The largest relative error between two ways of running `program` that rounding explains."""
    if any(True for _ in program.calls(quantize_dequantize.target)):
        return ROUNDED_LIMIT
    return max(0.01, 4 * tolerance(outputs))


def _inputs(program: Program, length: int) -> dict[str, Tensor]:
    contract = program.contract
    if contract.input("token") is None:
        sizes = contract.sizes({"sequence": length})
        return {**contract.draw(sizes), **contract.allocate(sizes)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, contract.input("token").high or 2, (2, length), generator=generator)
    return token_inputs(program, ids)


def _tokens_per_second(program: Program, run: Executable) -> float | None:
    metadata, contract = program.metadata, program.contract
    if not contract.state or not metadata.vocab_size:
        return None
    room = metadata.context_length or 64
    sizes = {"prompt_tokens": min(32, room // 2), "new_tokens": min(16, room // 4)}
    return speed.measure(run, contract, metadata.vocab_size, repetitions=1, **sizes).decode_tokens_per_second


__all__ = ["Export", "Format", "FormatOptions", "Verified", "compare", "error_limit"]
