"""Conversion to grouped-query attention that turns heads towards each other before it averages them.

    k_i -> R_i k_i,  q -> R_i q       R_i: rotations that commute with rope, of each of its pairs and of free channels
    v_i -> Q_i v_i,  Wo -> Wo Q_i^T   Q_i: any orthogonal matrix

change nothing, and R_i, Q_i are chosen so that the heads of a group are near to their mean on calibration activations
(orthogonal Procrustes, alternating). Heads are grouped by their distance after alignment.
"""

from torch import Tensor

from graphwright.heads import Heads
from graphwright.pass_ import Paper
from graphwright.passes.attention._conversion import GqaConversion
from graphwright.passes.attention._merging import (
    HeadWeights,
    aligned,
    averaged,
    distances,
    key_turn,
    root,
    similar,
    turn_to,
)  # fmt: skip


class GqaAligned(GqaConversion):
    """Mean pooling of heads in a common basis."""

    name = "gqa_aligned"
    paper = Paper(
        "Align Attention Heads Before Merging Them: An Effective Way for Converting MHA to GQA",
        "Jin et al.",
        2024,
        "2412.20677",
    )

    def order(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> Tensor:
        """Groups by the distance that is left after each pair of heads has been aligned."""
        if gram is None or self.groups == 1:
            return super().order(weights, heads, gram)
        metric = root(gram)
        keys = distances(weights.key @ metric, lambda a, b: key_turn(a, b, heads.basis) @ a)
        values = distances(weights.value @ metric, (lambda a, b: turn_to(a, b) @ a) if heads.value_free else None)
        return similar(keys + values, self.groups)

    def merge(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> HeadWeights:
        """Turns, then averages."""
        if gram is None:
            return averaged(weights, self.groups)
        return averaged(aligned(weights, self.groups, heads.basis, gram, values=heads.value_free), self.groups)
