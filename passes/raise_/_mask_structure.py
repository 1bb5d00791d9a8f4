"""The structure of a mask, from its values: causal, windows, chunks, a prefix, padding.

    classify([Case(allowed=torch.ones(1, 9, 9).tril().bool())])     # Structure(causal=True)

Hypotheses come from the longest case without padding; the one with the fewest attributes that reproduces every case,
by the attention op's own definition of what is visible, is the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product

import torch
from torch import Tensor

from graphwright.ops.attention import visible_keys


@dataclass(frozen=True)
class Case:
    """A mask at one size, with the padding that it was evaluated under."""

    allowed: Tensor
    """Bool [B, S, T]: which key each query may see."""
    keys: Tensor | None = None
    """Bool [B, T]: keys that are not padding; None where padding does not concern the keys."""
    queries: Tensor | None = None
    """Bool [B, S]: queries that are not padding; what the others see does not matter."""

    @property
    def unpadded(self) -> bool:
        """Whether nothing is padding."""
        return self.keys is None or bool(self.keys.all())


@dataclass(frozen=True)
class Structure:
    """The mask attributes of the attention op, and whether keys that are padding are hidden."""

    causal: bool = False
    window: int = 0
    chunk: int = 0
    prefix: int = 0
    padding: bool = False

    def allowed(self, queries: int, keys: int) -> Tensor:
        """Bool [S, T] for positions 0, 1, 2 … without padding."""
        steps = torch.arange(max(queries, keys))[None]
        return visible_keys(
            steps[:, :queries], steps[:, :keys],
            causal=self.causal, window=self.window, chunk=self.chunk, prefix=self.prefix,
        )[0]  # fmt: skip

    def __str__(self) -> str:
        """The attributes that are set: `causal, window 5`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        words = [name if value is True else f"{name} {value}" for name, value in values.items() if value]
        return ", ".join(words) or "full"


def classify(cases: Sequence[Case]) -> Structure | None:
    """The simplest structure that holds in all cases; None if there is none."""
    unpadded = [case for case in cases if case.unpadded]
    if not unpadded:
        return None
    longest = max(unpadded, key=lambda case: case.allowed[0].numel())
    ordered = sorted(cases, key=lambda case: case.allowed.numel())
    for structure in _hypotheses(longest.allowed[0]):
        if all(_holds(structure, case) for case in ordered):
            return structure
    return None


def _hypotheses(allowed: Tensor) -> Iterator[Structure]:
    """Structures whose numbers show in a mask [S, T]: longest distance, first gap, last key seen ahead of time."""
    distance = _longest_distance(allowed)
    windows = {0, distance + 1} if distance + 1 < max(allowed.shape) else {0}
    below = allowed.diagonal(-1)
    chunks = {0, 1 + int((~below).to(torch.int8).argmax())} if below.numel() and not below.all() else {0}
    ahead = allowed.triu(1).any(0).nonzero()
    prefixes = {0, int(ahead[-1]) + 1} if len(ahead) else {0}
    choices = product((False, True), windows, chunks, prefixes, (False, True))
    found = {Structure(*choice) for choice in choices if choice[0] or not choice[3]}
    yield from sorted(found, key=lambda s: (sum(map(bool, vars(s).values())), bool(s.chunk)))


def _longest_distance(allowed: Tensor) -> int:
    """Largest |query - key| that is allowed; -1 if nothing is."""
    queries, keys = allowed.shape
    some, steps = allowed.any(1), torch.arange(queries)
    if not some.any():
        return -1
    first = allowed.to(torch.int8).argmax(1)
    last = keys - 1 - allowed.flip(1).to(torch.int8).argmax(1)
    return int(torch.maximum(steps - first, last - steps)[some].max())


def _holds(structure: Structure, case: Case) -> bool:
    expected = structure.allowed(*case.allowed.shape[1:])[None]
    if structure.padding:
        if case.keys is None:
            return False
        expected = expected & case.keys[:, None, :]
    differs = case.allowed ^ expected
    if case.queries is not None:
        differs = differs & case.queries[:, :, None]
    return not differs.any()
