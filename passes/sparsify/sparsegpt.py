"""SparseGPT: columns are pruned one after another, and the columns that follow take over what each removal costs.

A weight's score is w_j^2 / U_jj^2, the least increase of ||(W - Q) X||^2 that its removal causes; n:m groups are
decided when the sweep reaches them, other patterns once per block of columns. The order of work is in
`graphwright.second_order`.
"""

import torch
from pydantic import Field
from torch import Tensor

from graphwright.calibration import Hessian
from graphwright.pass_ import Paper
from graphwright.pruner import Pruner
from graphwright.second_order import Selection, aligned, inverse_factor, sweep


class SparseGpt(Pruner):
    """Zeroes weights and updates those that stay."""

    name = "sparsegpt"
    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Frantar and Alistarh",
        2023,
        "2301.00774",
    )
    calibrated = True

    damping: float = Field(0.01, gt=0, description="part of the Hessian's mean diagonal that is added to it")
    block_size: int = Field(128, gt=0, description="columns between two updates of the rest")

    def prune(self, weight: Tensor, statistics: Hessian | None) -> Tensor:
        """Prunes and updates one weight.

        Raises:
            PassError: the Hessian is not positive definite, however it is damped.
        """
        matrix = statistics.matrix
        # Nothing flows through a dead channel, so its weights are the first to go.
        columns = weight.masked_fill(matrix.diagonal() == 0, 0.0).t().contiguous()
        factor = inverse_factor(matrix, self.damping)
        selection = Selection(self.shape, self.removed, self.block_size, factor)

        def settle(place: int, own: Tensor) -> Tensor:
            return torch.where(selection.keep(place, columns), own, 0.0)

        sweep(columns, factor, aligned(self.block_size, self.shape.step), settle)
        return columns.t().contiguous()
