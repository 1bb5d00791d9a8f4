"""Wanda: pruning by |w_ij| * ||x_j||_2, the weight's magnitude times the norm of the input channel that it meets.

Weights compete within their output row, so each row loses the same number; nothing else is updated. The norms are
those of the inputs behind the layers that are already pruned. Blocks compete by the sum of squared scores.
"""

from torch import Tensor

from graphwright.calibration import Hessian
from graphwright.pass_ import Paper
from graphwright.pruner import Pruner


class Wanda(Pruner):
    """Zeroes weights that matter little for the inputs they meet."""

    name = "wanda"
    paper = Paper("A Simple and Effective Pruning Approach for Large Language Models", "Sun et al.", 2023, "2306.11695")
    calibrated = True

    def prune(self, weight: Tensor, statistics: Hessian | None) -> Tensor:
        """Scores are the squares w_ij^2 (X^T X)_jj, which order as the paper's do."""
        scores = weight.square() * statistics.matrix.diagonal()
        return weight * self.shape.keep(scores, self.removed, per_row=True)
