"""HQQ, half-quadratic quantization (Badri and Shaji 2023): zero points that make few large weight errors, without data.

The p-norm of the weight error with p < 1 forgives outliers. It is minimised over the zero points by turns: the
errors E = shrink(W - Q) are split off, then each zero point becomes the mean of codes - (W - E) / scale over its group.
Zero points are therefore fractions, stored in float16.
"""

from typing import Any

from pydantic import Field
from torch import Tensor

from graphwright import rounding
from graphwright.pass_ import Paper
from graphwright.rounding import Grid, Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import IntegerQuantizer, integer_format


class Hqq(IntegerQuantizer):
    """Calibration-free rounding with optimised zero points."""

    name = "hqq"
    paper = Paper("Half-Quadratic Quantization of Large Machine Learning Models", "Badri and Shaji", 2023)
    # Zero is no code of a grid with fractional zero points, so a pruned weight would not stay pruned.
    conflicts = (*IntegerQuantizer.conflicts, "sparse")

    norm: float = Field(0.7, gt=0, lt=1, description="p of the norm of the weight error")
    strength: float = Field(10.0, gt=0, description="initial weight of the quadratic penalty")
    growth: float = Field(1.01, ge=1, description="factor of the penalty per turn")
    turns: int = Field(20, gt=0, description="at most so many turns")

    def scheme(self) -> Scheme:
        """Asymmetric, with fractional zero points."""
        return Scheme(
            format=integer_format(self.bits),
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
            zero_dtype="float16",
        )

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Optimises the zero points of a weight as long as its mean error falls."""
        wide = rounding.grouped(weight, scheme)
        best, strength = rounding.grid(wide, scheme), self.strength
        codes = best.codes(wide, scheme.format)
        lowest = float((wide - best.values(codes, scheme.format)).abs().mean())
        grid = best
        for _ in range(self.turns):
            error = self._shrink(wide - grid.values(codes, scheme.format), strength)
            zero = (codes - (wide - error) / grid.scale.float().unsqueeze(-1)).mean(-1)
            grid = Grid(grid.scale, zero.half())
            codes = grid.codes(wide, scheme.format)
            found = float((wide - grid.values(codes, scheme.format)).abs().mean())
            if found >= lowest:
                break
            best, lowest = grid, found
            strength *= self.growth
        return rounding.quantize(weight, scheme, best)

    def _shrink(self, error: Tensor, strength: float) -> Tensor:
        """The proximal step of the p-norm: small errors vanish, large ones stay."""
        magnitude = error.abs()
        return error.sign() * (magnitude - magnitude.clamp(min=1e-8) ** (self.norm - 1) / strength).clamp(min=0)
