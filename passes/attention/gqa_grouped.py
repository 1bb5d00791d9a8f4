"""Conversion to grouped-query attention that averages the heads which are most alike.

Key-value heads are sorted into equal groups so that the distances of their weights within groups are small; query
heads and the columns of the output projection move along. Neighbours as they stand are where the search begins, so
the pooling error is never larger than that of gqa_mean.
"""

from typing import ClassVar

from torch import Tensor

from graphwright.heads import Heads
from graphwright.pass_ import Paper
from graphwright.passes.attention._conversion import GqaConversion
from graphwright.passes.attention._merging import HeadWeights, averaged, distances, similar


class GqaGrouped(GqaConversion):
    """Mean pooling of similar heads."""

    name = "gqa_grouped"
    paper = Paper(
        "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        "Ainslie et al.",
        2023,
        "2305.13245",
    )
    calibrated: ClassVar[bool] = False

    def order(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> Tensor:
        """Groups by the distance of keys plus that of values, each relative to its size."""
        return similar(distances(weights.key) + distances(weights.value), self.groups)

    def merge(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> HeadWeights:
        """Averages."""
        return averaged(weights, self.groups)
