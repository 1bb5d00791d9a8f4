"""Choosing the next token from logits: the most likely one, or a draw from what the usual filters leave.

Temperature, top-k (Fan et al. 2018, arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p (Nguyen
et al. 2024, arXiv:2407.01082) keep the same tokens as the logits warpers of `transformers`, applied in this order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op

REMOVED = float("-inf")
TOP_P_CANDIDATES = (256, 2048)


@op
def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:  # fmt: skip
    """The next token of every row; -1 where its logits are NaN.

    Args:
        logits: [B, V], any floating dtype.
        uniform: float64 [B] in [0, 1), the place in the cumulative distribution that is drawn; unused when greedy.
        temperature: divides the logits; 0 takes the first of the most likely tokens, and no filter applies.
        top_k: keep the k most likely tokens and ties with the last of them; 0 keeps all.
        top_p: keep the fewest most likely tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one; 0 keeps all.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        # max and not argmax: its value shows NaN, and it is the faster of the two.
        values, tokens = logits.max(-1)
        return tokens.masked_fill(values.isnan(), -1)
    probabilities = filtered(logits.float() / temperature, top_k, top_p, min_p).softmax(-1)
    # NaN anywhere in a row makes its whole softmax NaN, so one column tells.
    return inverted(probabilities, uniform[:, None]).masked_fill(probabilities[:, 0].isnan(), -1)


def filtered(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Filters on float32 logits [B, V]; removed tokens become -inf."""
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
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


def inverted(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token of every row [B, V] by its probability, int64 [B], for float64 numbers [B, 1] in [0, 1).

    By inverting the cumulative distribution: `torch.multinomial` makes a random number per token of the vocabulary,
    which takes a millisecond of every step. Tokens of probability 0 are never drawn.
    """
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    # Rounding may carry uniform * total up to total, which lies behind the last token.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, threshold, right=True).squeeze(-1)


@sample_tokens.fake
def _fake(logits: Tensor, *_rest: object, **_more: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@sample_tokens.cost
def _cost(logits: TensorInfo, *_rest: object) -> Cost:
    return Cost(flops=10 * logits.numel)


@sample_tokens.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for temperature, top_k, top_p, min_p in ((0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.3, 20, 0.9, 0.05)):
        logits = 3 * torch.randn(3, 45, dtype=dtype)
        uniform = torch.rand(3, dtype=torch.float64)
        note = f"temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}"
        yield Sample((logits, uniform, temperature, top_k, top_p, min_p), note=note)
