"""Scissorhands: what was of no importance lately stays so; it goes, many tokens at once.

    unimportance[j] += number of the last `history` queries with softmax(q k / √d)[j] < 1 / t
    when full, the `drop` share with the highest counts goes, and counting starts anew

Liu et al. 2023, arXiv:2305.17118, algorithm 2: t is the number of tokens that a query sees, the newest `recent` ones
stay in any case. Counts are kept per key-value head, over the query heads that share it. The rewrite is that of
`_evicting`.
"""

from typing import ClassVar

from pydantic import Field

from graphwright.pass_ import Paper
from graphwright.passes.kv_cache._evicting import EvictingCache


class ScissorhandsCache(EvictingCache):
    """Tokens that were pivotal lately."""

    name = "scissorhands_cache"
    paper = Paper(
        "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time",
        "Liu et al.", 2023, "2305.17118",
    )  # fmt: skip
    count_low: ClassVar[bool] = True
    highest: ClassVar[bool] = False

    budget: float = Field(
        0.2, gt=0, description="tokens that are held, or, up to 1, their share of the model's longest context"
    )
    recent: int = Field(10, ge=1, description="newest tokens that are never evicted")
    history: int = Field(400, ge=1, description="queries before an eviction whose attention counts")
    drop: float = Field(0.5, gt=0, lt=1, description="share of the budget that an eviction frees")

    @property
    def streamed(self) -> int:
        """Drawn tokens for a budget in tokens; a share of a long context needs calibration text to be seen."""
        return int(3 * self.budget) + 64 if self.budget > 1 else 64

    def held(self, context_length: int) -> int:
        """The budget in tokens."""
        return int(self.budget * context_length) if self.budget <= 1 else int(self.budget)

    def protected(self, held: int) -> int:
        """The newest."""
        return self.recent

    def freed(self, held: int) -> int:
        """Half of the budget, by default."""
        return int(held * self.drop)

    def observed(self) -> int:
        """The last queries."""
        return self.history
