"""Sliding-window attention: a query sees the last `window` tokens, itself included.

Caches become rings of that many slots, and time and memory per token stop growing with the text. Layers of a model
reach further together: behind L layers a token may know of the last L * window (Beltagy et al. 2020,
arXiv:2004.05150). Without training the loss can be large once the first tokens leave the window, because attention
likes to rest on them (see `attention_sinks`).
"""

from collections.abc import Mapping

from pydantic import Field

from graphwright.pass_ import Paper
from graphwright.passes.attention._limiting import LimitedAttention


class SlidingWindow(LimitedAttention):
    """Sets a window on every attention that sees the whole text."""

    name = "sliding_window"
    paper = Paper("Mistral 7B", "Jiang et al.", 2023, "2310.06825")

    window: int = Field(gt=0, description="keys that a query sees, its own included")

    @property
    def limits(self) -> Mapping[str, int]:
        """The window."""
        return {"window": self.window}
