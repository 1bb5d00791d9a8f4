"""Conversion to grouped-query attention by averaging the keys and values of neighbouring heads.

groups=1 is multi-query attention (Shazeer 2019, arXiv:1911.02150). The paper trains on with a twentieth of the
original steps; without that the loss is large, and the other gqa passes lose less.
"""

from typing import ClassVar

from torch import Tensor

from graphwright.heads import Heads
from graphwright.pass_ import Paper
from graphwright.passes.attention._conversion import GqaConversion
from graphwright.passes.attention._merging import HeadWeights, averaged


class GqaMean(GqaConversion):
    """Mean pooling of heads as they stand."""

    name = "gqa_mean"
    paper = Paper(
        "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        "Ainslie et al.",
        2023,
        "2305.13245",
    )
    calibrated: ClassVar[bool] = False

    def merge(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> HeadWeights:
        """Averages."""
        return averaged(weights, self.groups)
