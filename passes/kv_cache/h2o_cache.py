"""H2O: a cache of the newest tokens and of the heavy hitters, those that gathered most attention.

    score[j] += sum over queries of softmax(q k / √d)[j]        when full, the lowest score that is not recent goes

Zhang et al. 2023, arXiv:2306.14048. Scores are kept per key-value head, summed over the query heads that share it.
The rewrite is that of `_evicting`.
"""

from pydantic import Field

from graphwright.pass_ import Paper
from graphwright.passes.kv_cache._evicting import EvictingCache


class H2oCache(EvictingCache):
    """Recent tokens and heavy hitters."""

    name = "h2o_cache"
    paper = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", "Zhang et al.", 2023,
        "2306.14048",
    )  # fmt: skip

    budget: float = Field(
        0.2, gt=0, description="tokens that are held, or, up to 1, their share of the model's longest context"
    )
    recent: float = Field(0.5, gt=0, lt=1, description="share of the budget that goes to the newest tokens")

    @property
    def streamed(self) -> int:
        """Drawn tokens for a budget in tokens; a share of a long context needs calibration text to be seen."""
        return int(3 * self.budget) + 64 if self.budget > 1 else 64

    def held(self, context_length: int) -> int:
        """The budget in tokens."""
        return int(self.budget * context_length) if self.budget <= 1 else int(self.budget)

    def protected(self, held: int) -> int:
        """The newest."""
        return int(held * self.recent)
