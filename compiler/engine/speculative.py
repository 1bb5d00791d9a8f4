"""Speculative decoding: cheap guesses of the next tokens, all checked by one call of the program.

    text … t | d1 d2 d3       a drafter proposes d1 … dk
    p1 p2 p3 p4               one call over t, d1 … dk gives what the program would have chosen at each place
    d1 d2 | p3                the guesses that hold are kept, and one more token comes with them

Greedy, the tokens are those of plain decoding. Sampled, a guess d of probability q(d) is kept with probability
min(1, p(d) / q(d)), and where one falls the token is drawn from max(0, p - q): the tokens have the program's own
distribution, whatever the drafter guesses. Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.

Both hold as far as the program computes the same for one token and for several. Kernels that sum in another order may
settle a near tie, or the rounding of an activation, differently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graphwright.engine.sampling import Sampling, distribution, draw

LONGEST_MATCH = 3
"""Tokens of an n-gram that prompt lookup searches for first."""


@dataclass(frozen=True)
class Draft:
    """Guesses.

    Attributes:
        tokens: the guessed tokens, perhaps none.
        probabilities: [len(tokens), V], what they were drawn from; None for guesses that are certain.
    """

    tokens: list[int]
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Whoever guesses."""

    def propose(self, text: list[int], count: int) -> Draft:
        """At most `count` guesses of what follows `text`, prompt included."""
        ...


class PromptLookup:
    """Guesses that the text goes on as it did after the last tokens stood there before.

    Yang et al. 2023, Inference with Reference, arXiv:2304.04487; n-grams as in Saxena's prompt lookup decoding.
    """

    def propose(self, text: list[int], count: int) -> Draft:
        """What followed the most recent earlier place of the longest n-gram that ends the text."""
        for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
            wanted = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == wanted:
                    return Draft(text[start + length : start + length + count])
        return Draft([])


class ModelDrafter:
    """Guesses with a smaller program: another model, or a cheaper rewrite of the same one.

    Args:
        extend: runs the program over tokens from a place of the text on, and gives the logits [S, V] after each.
        sampling: how guesses are chosen.
        generator: draws them.
    """

    def __init__(
        self, extend: Callable[[int, list[int]], Tensor], sampling: Sampling, generator: torch.Generator
    ) -> None:
        self._extend = extend
        self._sampling = sampling
        self._generator = generator
        self._cached: list[int] = []

    def propose(self, text: list[int], count: int) -> Draft:
        """Guesses one token after the other; what the caches hold of an earlier guess that fell is written over."""
        guesses: list[int] = []
        drawn_from = []
        for _ in range(count):
            whole = text + guesses
            known = _common(self._cached, whole[:-1])
            logits = self._extend(known, whole[known:])[-1:]
            self._cached = whole
            probabilities = distribution(logits, self._sampling, whole)
            drawn_from.append(probabilities)
            guesses.append(int(draw(probabilities, self._generator)))
        return Draft(guesses, torch.cat(drawn_from) if drawn_from else None)


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def accept(draft: Draft, target: Callable[[list[int]], Tensor], generator: torch.Generator) -> list[int]:
    """The guesses that hold, and the token that follows them.

    Args:
        draft: the guesses.
        target: what the program chooses from, [1, V], after so many guesses that hold.
        generator: decides.
    """
    kept: list[int] = []
    for place, guess in enumerate(draft.tokens):
        wanted = target(kept)
        guessed = None if draft.probabilities is None else draft.probabilities[place : place + 1]
        # A vocabulary may hold more tokens than the head predicts.
        likely = float(wanted[0, guess]) if guess < wanted.shape[1] else 0.0
        bound = 1.0 if guessed is None else float(guessed[0, guess])
        if float(torch.rand((), generator=generator, dtype=torch.float64)) * bound < likely:
            kept.append(guess)
            continue
        return [*kept, int(draw(_rest(wanted, guessed, guess), generator))]
    return [*kept, int(draw(target(kept), generator))]


def _rest(wanted: Tensor, guessed: Tensor | None, guess: int) -> Tensor:
    """What is left of the program's probabilities when a guess has fallen; not yet divided by its sum."""
    if guessed is None:
        rest = wanted.clone()
        rest[0, guess : guess + 1] = 0
    else:
        rest = (wanted - guessed).clamp_min(0)
    # Rounding can leave nothing where both are equal.
    return rest if float(rest.sum()) > 0 else wanted
