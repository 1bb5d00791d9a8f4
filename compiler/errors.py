"""Errors for people: what is wrong, what was expected, where, and what to do about it.

Every error that Graphwright raises on purpose is a `GraphwrightError`. The command line prints its text as
one paragraph and exits with the class's `exit_code`; Python users catch the class they care for.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GraphwrightError(Exception):
    """Base of all errors that Graphwright raises on purpose.

    Args:
        problem: what went wrong, as a sentence without the final full stop.
        where: node, layer or file in which it happened.
        fix: what the reader can do about it, as a sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        self.problem = problem.rstrip(".")
        self.where = where
        self.fix = fix.rstrip(".")
        super().__init__(self._paragraph())

    def _paragraph(self) -> str:
        sentences = [self.problem + "."]
        if self.where:
            sentences.append(f"At: {self.where}.")
        if self.fix:
            sentences.append(self.fix + ".")
        return " ".join(sentences)


class SourceError(GraphwrightError):
    """A model or a text that was named cannot be found or read."""

    exit_code = 3


class CaptureError(GraphwrightError):
    """The model was read, but no graph could be captured from it."""

    exit_code = 4


class RecipeError(GraphwrightError):
    """A recipe, a pass name or a pass option is wrong."""

    exit_code = 5


class TargetError(GraphwrightError):
    """A target is unknown, or it is not the machine at hand."""

    exit_code = 6


class PassError(GraphwrightError):
    """A pass could not do its work, or did not keep its contract."""

    exit_code = 7


class VerificationError(PassError):
    """A pass that is declared exact changed what the program computes."""

    exit_code = 8


class BudgetError(PassError):
    """An approximate pass cost more accuracy than the recipe's budget allows."""

    exit_code = 9


class BackendError(GraphwrightError):
    """A backend could not lower the program."""

    exit_code = 10


class ArtifactError(GraphwrightError):
    """A saved artifact is missing, truncated, altered or made for something else."""

    exit_code = 11


class GenerationError(GraphwrightError):
    """A request for text or tokens cannot be served."""

    exit_code = 12


def nearest(wrong: str, known: Iterable[str]) -> str:
    """Names the known word closest to `wrong`, as a sentence for an error's `fix`.

    >>> nearest("int5", ["int4", "int8", "bf16"])
    'Did you mean int4? Known: bf16, int4, int8'
    """
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}"
