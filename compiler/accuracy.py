"""Accuracy of a compiled program on text: perplexity, divergence from the original, greedy agreement.

    text = held_out_text()
    windows = token_windows(tokenizer.encode(text), length=256, count=16)
    accuracy = measure(compiled.logits, windows, reference=original.logits)

The built-in text is the documentation that ships with CPython (`pydoc_data.topics`), so nothing is downloaded; its
last fifth is held out for evaluation and the rest may serve calibration.
"""

import math
from collections.abc import Callable
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
