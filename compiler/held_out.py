"""What a compile measures on held-out text for its report: accuracy on short windows, and perplexity over length.

texts = HeldOutText(tokenizer, evaluate=4, lengths=(1024, 8192), progress=progress)
texts.measure_original(captured)         before rewriting uses the captured program up
texts.require_context(rewritten)
texts.measure(compiled, report)
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from graphwright import accuracy
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import GraphwrightError
from graphwright.feeding import last_logits, logits_of
from graphwright.program import Program
from graphwright.report.data import Report

WINDOW = 128
"""Tokens of a window on which accuracy is measured."""


class Runs(Protocol):
    """A compiled program."""

    program: Program

    def __call__(self, **tensors: Tensor) -> Any:
        """Outputs for the contract's inputs."""

    def logits(self, input_ids: Tensor) -> Tensor:
        """Of every token."""


class HeldOutText:
    """Measures the captured program, then the compiled one on the same text."""

    def __init__(
        self, tokenizer: Path, evaluate: int, lengths: Sequence[int], progress: Callable[[str, float], None]
    ) -> None:
        """Says what is wanted.

        Args:
            tokenizer: directory of the model's tokenizer; it need not exist.
            evaluate: windows on which both programs are compared; without a tokenizer, or where the model is no
                language model, none are.
            lengths: of texts, for perplexity.
            progress: called with what is being done and the finished fraction.
        """
        self._tokenizer, self._evaluate, self._lengths, self._progress = tokenizer, evaluate, lengths, progress
        self._kept = tempfile.TemporaryDirectory(prefix="graphwright-logits-")
        self._windows: Tensor | None = None
        self._original: accuracy.Logits | None = None
        self._original_lengths: dict[int, float] = {}

    def measure_original(self, program: Program, *, here: bool) -> None:
        """Keeps the captured program's logits on the windows, and its perplexity at the lengths that it takes.

        Args:
            program: the captured one.
            here: whether the compiled program will run on this machine; nothing is compared otherwise.

        Raises:
            GraphwrightError: lengths were asked for that cannot be measured; it is found before the long work.
        """
        readable = here and self._tokenizer.is_dir() and program.metadata.causal
        if self._lengths and not readable:
            raise GraphwrightError(
                "Perplexity over length is measured on text, by running the compiled language model here",
                fix="Compile a causal model with a tokenizer for this machine, or ask for no lengths",
            )
        if self._evaluate and readable:
            self._progress("evaluate the original", 0.0)
            length = min(WINDOW, program.metadata.context_length or WINDOW)
            self._windows = accuracy.token_windows(self._tokens(), length, self._evaluate)
            self._original = accuracy.remember(partial(logits_of, program), self._windows, Path(self._kept.name))
        if self._lengths:
            self._original_lengths = self._perplexities(program, program, program.metadata.context_length)

    def require_context(self, program: Program) -> None:
        """Refuses lengths that the rewritten program does not take.

        Raises:
            GraphwrightError: there is one.
        """
        longest, context = max(self._lengths, default=0), program.metadata.context_length
        if longest > context:
            raise GraphwrightError(
                f"Perplexity was asked for at {longest} tokens, and the rewritten program takes {context}",
                fix="Ask for shorter texts, or lengthen the context with a pass such as yarn",
            )

    def measure(self, compiled: Runs, report: Report) -> None:
        """Writes into the report how the compiled program does beside the original."""
        if self._windows is not None and self._original is not None:
            report.accuracy = accuracy.measure(
                compiled.logits,
                self._windows,
                reference=self._original,
                text=accuracy.HELD_OUT_TEXT,
                progress=self._progress,
            ).to_json()
        if self._lengths:
            found = self._perplexities(compiled, compiled.program, max(self._lengths))
            report.lengths = [
                {"length": length, "perplexity": value, "reference_perplexity": self._original_lengths.get(length)}
                for length, value in sorted(found.items())
            ]
        self._kept.cleanup()

    def _tokens(self) -> list[int]:
        return Tokenizer(self._tokenizer).encode(accuracy.built_in_text(held_out=True))

    def _perplexities(self, call: Callable[..., Any], program: Program, longest: int) -> dict[int, float]:
        """Of `program` as `call` runs it, at the lengths up to `longest`."""
        tokens = self._tokens()
        ends = accuracy.text_ends(tokens, self._lengths)
        taken = [length for length in self._lengths if length <= longest]
        logits = partial(last_logits, call, program)
        return accuracy.over_lengths(logits, tokens, ends, taken, self._progress) if taken else {}
