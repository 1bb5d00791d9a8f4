"""Choosing the next token from logits [B, V]: greedy, or sampled with the usual filters.

    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1)
    sampling.check()
    tokens = choose(logits, sampling, sampling.generator())

The filters keep the same tokens as the logits warpers of `transformers`, applied in the same order: repetition penalty,
temperature, top-k, top-p, min-p. They are pure functions; nothing here knows of a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.errors import GenerationError

REMOVED = float("-inf")
TOP_P_CANDIDATES = (256, 2048)


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


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """The next token of every row, int64 [B].

    Args:
        logits: [B, V], any floating dtype; not changed.
        sampling: how to choose.
        generator: advanced by one draw of B numbers unless greedy.
        seen: bool [B, V], the tokens that the repetition penalty applies to.

    Raises:
        GenerationError: the logits are NaN.
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        logits = penalize(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature > 0:
        probabilities = warp(logits.float(), sampling).softmax(-1)
        # NaN anywhere in a row makes its whole softmax NaN, so one column tells.
        _refuse_nan(probabilities[:, 0])
        return draw(probabilities, generator)
    # max and not argmax: its value shows NaN, and it is the faster of the two.
    values, tokens = logits.max(-1)
    _refuse_nan(values)
    return tokens


def distribution(logits: Tensor, sampling: Sampling, text: Sequence[int]) -> Tensor:
    """The probabilities [1, V] that the token after `text` is chosen from; one of them is 1 where that is greedy.

    Raises:
        GenerationError: the logits are NaN.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, seen_tokens([text], logits), sampling.repetition_penalty)
    _refuse_nan(logits.amax(-1))
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
    logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Removes every token less likely than the k-th; ties with it stay."""
    k = min(k, logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], REMOVED)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest most likely tokens whose probabilities reach `p`, and always the most likely one.

    A token stays if those before it do not reach `p` yet. That asks for sorted logits, and sorting a vocabulary takes
    milliseconds: the head of the distribution is sorted alone when it holds `p` already.
    """
    probabilities = logits.softmax(-1)
    size = logits.shape[-1]
    for count in (*(n for n in TOP_P_CANDIDATES if n < size), size):
        # topk of everything is far slower than sort.
        likely, index = probabilities.topk(count) if count < size else probabilities.sort(descending=True)
        before = likely.cumsum(-1) - likely
        if bool((before[:, -1] >= p).all()):
            break
    keep = before < p
    keep[:, 0] = True
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, keep)
    return logits.masked_fill(~kept, REMOVED)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Removes every token that is less likely than `min_p` times the most likely one."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), REMOVED)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of `seen` tokens [B, V] by the penalty (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token of every row by its probability, int64 [B].

    By inverting the cumulative distribution: `torch.multinomial` makes a random number per token of the vocabulary,
    which takes a millisecond of every step. Tokens of probability 0 are never drawn.
    """
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    uniform = torch.rand(total.shape, generator=generator, dtype=torch.float64)
    # Rounding may carry uniform * total up to total, which lies behind the last token.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, threshold, right=True).squeeze(-1)


def _refuse_nan(values: Tensor) -> None:
    if values.isnan().any():
        raise GenerationError(
            "The program's logits are NaN",
            fix="Its weights or a rewrite overflow: try another recipe, or `graphwright bisect` to find the pass",
        )
