"""FP8 weights (Micikevicius et al. 2022): E4M3 or E5M2 with one scale per output channel, group or tensor.

With the pass `activations` in the same format both sides of a product are FP8.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from graphwright import rounding
from graphwright.pass_ import Paper
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import WeightQuantizer


class Fp8(WeightQuantizer):
    """8-bit floating-point weights."""

    name = "fp8"
    paper = Paper("FP8 Formats for Deep Learning", "Micikevicius et al.", 2022, "2209.05433")

    format: Literal["fp8_e4m3", "fp8_e5m2"] = Field("fp8_e4m3", description="exponent and mantissa bits")
    group_size: int = Field(0, ge=-1, description="weights that share a scale; 0: an output channel; -1: the tensor")

    def scheme(self) -> Scheme:
        """Scales map the largest weight to the format's largest number."""
        return Scheme(format=self.format, group_size=self.group_size, symmetric=True, scale_dtype=self.scale_dtype)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Nearest numbers of the format."""
        return rounding.quantize(weight, scheme)
