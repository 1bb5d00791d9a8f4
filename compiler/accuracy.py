"""Accuracy of a compiled program on text: perplexity, divergence from the original, greedy agreement.

    text = held_out_text()
    windows = token_windows(tokenizer.encode(text), length=256, count=16)
    accuracy = measure(compiled.logits, windows, reference=original.logits)

The built-in text is the documentation that ships with CPython (`pydoc_data.topics`), so nothing is downloaded; its
last fifth is held out for evaluation and the rest may serve calibration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from graphwright.errors import GraphwrightError
from graphwright.numerics import mean_kl

Logits = Callable[[Tensor], Tensor]
"""Token ids [B, S] to logits [B, S, vocabulary]."""

HELD_OUT = 0.2
HELD_OUT_TEXT = "documentation of CPython, held-out fifth"
"""What reports call the built-in text's evaluation part."""
SCORED = 256
"""Tokens at the end of a text whose perplexity is measured over its length."""


@dataclass(frozen=True)
class Accuracy:
    """What was measured, over `tokens` predicted tokens.

    `mean_kl` is KL(original || program) in nats per token; `greedy_agreement` is the share of tokens whose most likely
    successor is the same. Both, and the original's perplexity, are None without an original to compare with.
    """

    perplexity: float
    tokens: int
    text: str
    reference_perplexity: float | None = None
    mean_kl: float | None = None
    greedy_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)


def built_in_text(*, held_out: bool) -> str:
    """English text that every installation has: its evaluation part, or the rest."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    cut = int(len(text) * (1 - HELD_OUT))
    return text[cut:] if held_out else text[:cut]


def token_windows(tokens: list[int], length: int, count: int) -> Tensor:
    """The first `count` windows of `length` tokens, [count, length].

    Raises:
        GraphwrightError: the text is shorter than one window.
    """
    available = len(tokens) // length
    if available == 0:
        raise GraphwrightError(
            f"The text has {len(tokens)} tokens, and one window takes {length}",
            fix="Give a longer text or a smaller window",
        )
    number = min(count, available)
    return torch.tensor(tokens[: number * length]).reshape(number, length)


def text_ends(tokens: list[int], lengths: Sequence[int], count: int = 2) -> list[int]:
    """Where `count` texts end, evenly spread, so that the longest of `lengths` fits before each.

    Raises:
        GraphwrightError: no length, one below 2, or one beyond the text.
    """
    if not lengths or min(lengths) < 2 or max(lengths) > len(tokens):
        raise GraphwrightError(
            f"A text of {len(tokens)} tokens does not show perplexity over lengths {', '.join(map(str, lengths))}",
            fix="Give lengths of at least 2 tokens that the text has",
        )
    ends: list[int] = torch.linspace(max(lengths), len(tokens), count).long().tolist()
    return ends


def over_lengths(
    logits: Callable[[Tensor, int], Tensor],
    tokens: list[int],
    ends: Sequence[int],
    lengths: Sequence[int],
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
) -> dict[int, float]:
    """Perplexity by length of the text: that of the last `SCORED` tokens, or of all but one of the shortest length.

    All lengths score the same tokens, and differ in how much of the text before them is seen.

    Args:
        logits: of ids [1, S] and n, those of the last n of them, [1, n, vocabulary].
        tokens: of the text.
        ends: where the texts end, from `text_ends`.
        lengths: of the texts.
        progress: called with what is being done and the finished fraction.
    """
    found = {}
    scored = min(SCORED, min(lengths) - 1)
    for index, length in enumerate(lengths):
        progress("perplexity over length", index / len(lengths))
        losses = []
        for end in ends:
            ids = torch.tensor([tokens[end - length : end]])
            predicted = logits(ids, scored + 1)[0, :-1].float()
            losses.append(float(functional.cross_entropy(predicted, ids[0, -scored:])))
        found[length] = math.exp(sum(losses) / len(losses))
    return found


def remember(logits: Logits, windows: Tensor, folder: Path) -> Logits:
    """`logits` on each of `windows`, from files in an existing folder: the model need not be kept for a comparison."""
    for index, window in enumerate(windows):
        save_file({"logits": logits(window[None]).contiguous()}, folder / f"{index}.safetensors")
    return recall(windows, folder)


def recall(windows: Tensor, folder: Path) -> Logits:
    """What `remember` wrote for the same windows."""

    def remembered(ids: Tensor) -> Tensor:
        index = next(i for i, window in enumerate(windows) if torch.equal(window[None], ids))
        return load_file(folder / f"{index}.safetensors")["logits"]

    return remembered


def measure(
    logits: Logits,
    windows: Tensor,
    *,
    reference: Logits | None = None,
    text: str = "",
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
) -> Accuracy:
    """Scores every token of every window but the first, one window at a time."""
    loss = reference_loss = divergence = agreed = 0.0
    for index, window in enumerate(windows):
        progress("evaluate", index / len(windows))
        ids = window[None]
        actual = logits(ids)[0, :-1].float()
        loss += float(functional.cross_entropy(actual, window[1:], reduction="sum"))
        if reference is not None:
            expected = reference(ids)[0, :-1].float()
            reference_loss += float(functional.cross_entropy(expected, window[1:], reduction="sum"))
            divergence += mean_kl(actual, expected) * len(expected)
            agreed += float((actual.argmax(-1) == expected.argmax(-1)).sum())
    scored = windows.numel() - len(windows)
    compared = reference is not None
    return Accuracy(
        perplexity=math.exp(loss / scored),
        tokens=scored,
        text=text,
        reference_perplexity=math.exp(reference_loss / scored) if compared else None,
        mean_kl=divergence / scored if compared else None,
        greedy_agreement=agreed / scored if compared else None,
    )
