"""MXFP4: E2M1 weights in blocks of 32 that share a power of two as their scale (OCP microscaling formats v1.0)."""

from typing import Any

from pydantic import Field
from torch import Tensor

from graphwright import rounding
from graphwright.pass_ import Paper
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import WeightQuantizer


class Mxfp4(WeightQuantizer):
    """Microscaling 4-bit floating-point weights."""

    name = "mxfp4"
    paper = Paper("Microscaling Data Formats for Deep Learning", "Rouhani et al.", 2023, "2310.10537")

    group_size: int = Field(32, gt=0, description="weights that share a scale along the input; 32 in the standard")

    def scheme(self) -> Scheme:
        """Powers of two as scales."""
        return Scheme(format="mxfp4", group_size=self.group_size, symmetric=True, scale_dtype=self.scale_dtype)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Nearest values of E2M1."""
        return rounding.quantize(weight, scheme)
