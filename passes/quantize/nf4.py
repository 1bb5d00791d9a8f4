"""NF4: 4-bit codes that stand for quantiles of the normal distribution, as pre-trained weights are distributed.

Each group is divided by its largest magnitude; the table is in `graphwright.packing`.
"""

from typing import Any

from torch import Tensor

from graphwright import rounding
from graphwright.pass_ import Paper
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import WeightQuantizer


class Nf4(WeightQuantizer):
    """Normal-float weights."""

    name = "nf4"
    paper = Paper("QLoRA: Efficient Finetuning of Quantized LLMs", "Dettmers et al.", 2023, "2305.14314")

    def scheme(self) -> Scheme:
        """One scale per group, no zero points."""
        return Scheme(format="nf4", group_size=self.group_size, symmetric=True, scale_dtype=self.scale_dtype)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Nearest quantiles."""
        return rounding.quantize(weight, scheme)
