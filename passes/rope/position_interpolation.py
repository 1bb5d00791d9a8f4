"""Position interpolation: positions are squeezed into the range that the model was trained for.

inv_freq / factor, which is position / factor
"""

from torch import Tensor

from graphwright.pass_ import Paper
from graphwright.passes.rope._frequencies import RopeScaling


class PositionInterpolation(RopeScaling):
    """All frequencies are divided by the factor."""

    name = "position_interpolation"
    paper = Paper(
        "Extending Context Window of Large Language Models via Positional Interpolation",
        "Chen et al.",
        2023,
        "2306.15595",
    )

    def scaled(self, inv_freq: Tensor, context_length: int) -> Tensor:
        """Position m turns by what m / factor did."""
        return inv_freq / self.factor
