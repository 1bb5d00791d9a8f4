"""SparseGPT and GPTQ in one sweep: a column is pruned and what stays is rounded; the later columns take over both.

Columns keep their order, or groups of an n:m pattern would be torn apart. The scale of each group is that of its
weights when the sweep reaches it. Zeros are exact: the range of every group contains zero.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from graphwright.calibration import Hessian
from graphwright.pass_ import Paper
from graphwright.passes.quantize.gptq import Gptq
from graphwright.pruner import PatternOptions
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme
from graphwright.second_order import Selection


class SparseGptq(PatternOptions, Gptq):
    """Prunes and rounds weights jointly."""

    name = "sparse_gptq"
    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Frantar and Alistarh",
        2023,
        "2301.00774",
    )
    after = ("merged_linear", "float_dtype", "folded", "pruned", "fewer_layers", "low_rank")
    provides = ("quantized", "sparse")
    conflicts = ("quantized", "sparse")

    act_order: Literal[False] = Field(False, description="columns keep their order")

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if not self.shape.of and self.block_size % self.shape.columns:
            raise ValueError(f"block_size is a multiple of the {self.shape.columns} columns of a block")
        return self

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Hessian) -> Quantized:
        """Prunes and rounds one weight.

        Raises:
            PassError: the Hessian is not positive definite, or the pattern does not divide the weight's shape.
        """
        self.shape.check(weight.shape)
        return super().solve(weight, scheme, statistics)

    def selection(self, factor: Tensor) -> Selection:
        """Decides by w^2 / U_jj^2."""
        return Selection(self.shape, self.removed, self.block_size, factor)
