"""Magnitude pruning: the weights of each layer that are smallest in absolute value become zero.

No calibration. Single weights compete within their layer, blocks by the sum of their squares.
"""

from torch import Tensor

from graphwright.calibration import Hessian
from graphwright.pass_ import Paper
from graphwright.pruner import Pruner


class Magnitude(Pruner):
    """Zeroes the smallest weights."""

    name = "magnitude"
    paper = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks", "Han et al.", 2015, "1506.02626"
    )

    def prune(self, weight: Tensor, statistics: Hessian | None) -> Tensor:
        """Scores are w^2."""
        return weight * self.shape.keep(weight.square(), self.removed)
