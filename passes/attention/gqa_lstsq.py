"""Conversion to grouped-query attention by least squares on calibration activations.

The heads of a group become one head that spans what their readers need most: for values a reduced-rank regression of
what the output projection makes of them, for keys one of the scores they give with the queries, within each of rope's
pairs as complex numbers. Queries and output projection take up how each old head is read from the new one; that the
new heads are a turned and scaled mean is the special case of gqa_aligned. Then the output projection is fitted to
what the old attention gives, for inputs as they are behind the layers that were converted before.
"""

from typing import ClassVar

from torch import Tensor

from graphwright.heads import Heads
from graphwright.pass_ import Paper
from graphwright.passes.attention._merging import HeadWeights, averaged, joined
from graphwright.passes.attention.gqa_aligned import GqaAligned


class GqaLstsq(GqaAligned):
    """Reduced-rank regression of keys and values, and a refitted output projection."""

    name = "gqa_lstsq"
    paper = Paper("Reduced-rank regression for the multivariate linear model", "Izenman", 1975)
    refits: ClassVar[bool] = True

    def merge(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> HeadWeights:
        """Solves for one head of each group."""
        if gram is None:
            return averaged(weights, self.groups)
        return joined(weights, self.groups, heads.basis, gram, values=heads.value_free)
