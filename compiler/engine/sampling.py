"""Choosing the next token from logits [B, V]: greedy, or sampled with the usual filters.

    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1)
    sampling.check()
    tokens = choose(logits, sampling, sampling.generator())

After the repetition penalty comes `graphwright.ops.sample_tokens`: temperature and filters, which keep the same tokens
as the logits warpers of `transformers`, and the draw. They are pure functions; nothing here knows of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.errors import GenerationError
from graphwright.ops import sample_tokens
from graphwright.ops.sample_tokens import filtered, inverted

Sampler = Callable[[Tensor, Tensor, float, int, float, float], Tensor]
"""Does what `graphwright.ops.sample_tokens` does, there or on another device."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A temperature of 0 is greedy, and the filters have no effect then.

    Attributes:
        temperature: divides the logits; below 1 sharper, above 1 flatter.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that together reach this probability.
        min_p: keep tokens at least this likely relative to the most likely one; 0 keeps all.
        repetition_penalty: above 1 makes tokens of the prompt and the continuation less likely.
        seed: the same seed draws the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            GenerationError: naming the setting, its value and its range.
        """
        limits = (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0, with 1 for none"),
        )
        for name, fine, allowed in limits:
            if not fine:
                raise GenerationError(f"{name} is {getattr(self, name)}", fix=f"It must be {allowed}")

    def generator(self) -> torch.Generator:
        """A fresh source of randomness, so that two requests with one seed draw alike."""
        return torch.Generator().manual_seed(self.seed)


def choose(
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    seen: Tensor | None = None,
    sample: Sampler = sample_tokens.reference,
) -> Tensor:
    """The next token of every row, int64 [B].

    Args:
        logits: [B, V], any floating dtype; not changed.
        sampling: how to choose.
        generator: advanced by one draw of B numbers unless greedy.
        seen: bool [B, V], the tokens that the repetition penalty applies to, where the logits lie.
        sample: chooses from logits and numbers in [0, 1).

    Raises:
        GenerationError: the logits are NaN.
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        logits = penalize(logits.float(), seen, sampling.repetition_penalty)
    greedy = sampling.temperature == 0
    uniform = torch.zeros(len(logits), dtype=torch.float64) if greedy else _uniform(len(logits), generator)
    tokens = sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    _refuse_nan(min(tokens.tolist()) < 0)
    return tokens


def distribution(logits: Tensor, sampling: Sampling, text: Sequence[int]) -> Tensor:
    """The probabilities [1, V] that the token after `text` is chosen from; one of them is 1 where that is greedy.

    Raises:
        GenerationError: the logits are NaN.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, seen_tokens([text], logits), sampling.repetition_penalty)
    _refuse_nan(bool(logits.amax(-1).isnan().any()))
    if sampling.temperature > 0:
        return warp(logits, sampling).softmax(-1)
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def seen_tokens(texts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Bool [B, V], the tokens that occur in each text."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        # A vocabulary may hold more tokens than the head predicts.
        seen[row, [token for token in text if token < logits.shape[1]]] = True
    return seen


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature and filters on float32 logits [B, V]; removed tokens become -inf."""
    return filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of `seen` tokens [B, V] by the penalty (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token of every row by its probability, int64 [B]; see `graphwright.ops.sample_tokens.inverted`."""
    return inverted(probabilities, _uniform(len(probabilities), generator)[:, None])


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _refuse_nan(found: bool) -> None:
    if found:
        raise GenerationError(
            "The program's logits are NaN",
            fix="Its weights or a rewrite overflow: try another recipe, or `graphwright bisect` to find the pass",
        )
