"""GPTQ: columns are rounded one after another, and each one's error is taken over by the columns that follow.

The order of work and the update of later columns are in `graphwright.second_order`. Layers are solved behind the
already quantized ones before them. A weight that is exactly zero stays zero, so a pruned layer stays pruned.

`act_order` rounds the columns with the largest H_jj first; scales then come from the weights as they were (static
groups), so that codes stay in their columns. Without it each group's scales follow from its updated weights.
"""

import torch
from pydantic import Field
from torch import Tensor

from graphwright import packing, rounding
from graphwright.calibration import Hessian
from graphwright.pass_ import Paper
from graphwright.rounding import Grid, Quantized
from graphwright.scheme import Scheme
from graphwright.second_order import Selection, aligned, inverse_factor, sweep
from graphwright.weight_quantizer import IntegerQuantizer


class Gptq(IntegerQuantizer):
    """Second-order weight rounding."""

    name = "gptq"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "Frantar et al.",
        2022,
        "2210.17323",
    )
    calibrated = True
    error_of = "outputs"

    damping: float = Field(0.01, gt=0, description="part of the Hessian's mean diagonal that is added to it")
    block_size: int = Field(128, gt=0, description="columns between two updates of the rest")
    act_order: bool = Field(True, description="most important columns first, over groups that are fixed before")

    def collector(self) -> Hessian:
        """X^T X."""
        return Hessian()

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Hessian) -> Quantized:
        """Rounds one weight.

        Raises:
            PassError: the Hessian is not positive definite, however it is damped.
        """
        importance = statistics.matrix.diagonal()
        # Nothing flows through a dead channel: its weights do not matter, and must not widen a range.
        wide = weight.float().masked_fill(importance == 0, 0.0)
        fixed = rounding.grid(rounding.grouped(wide, scheme), scheme) if self.act_order else None
        width = wide.shape[1]
        order = importance.argsort(descending=True, stable=True) if self.act_order else torch.arange(width)
        factor = inverse_factor(statistics.matrix[order][:, order], self.damping)
        columns = Columns(wide[:, order].t().contiguous(), order, scheme, fixed, self.selection(factor))
        sweep(columns.columns, factor, aligned(self.block_size, scheme.group(width)), columns.settle)
        return columns.quantized()

    def selection(self, factor: Tensor) -> Selection | None:
        """What decides which weights stay, where the method removes some; `factor` [K, K] is the sweep's."""
        return None

    def error(self, weight: Tensor, quantized: Quantized, statistics: Hessian) -> float:
        """Relative error of the layer's output."""
        return rounding.output_error(weight, quantized.dense(), statistics.matrix)


class Columns:
    """The columns of one weight while they are rounded, transposed: [K, N]."""

    def __init__(
        self, columns: Tensor, order: Tensor, scheme: Scheme, fixed: Grid | None, selection: Selection | None
    ) -> None:
        self.columns = columns
        self.zeros = columns == 0
        self.order = order.tolist()
        self.scheme = scheme
        self.width = len(columns)
        self.fixed = fixed
        self.selection = selection
        self.group_size = scheme.group(self.width)
        self.grids: dict[int, Grid] = {}
        self.codes = torch.zeros(-(-self.width // self.group_size) * self.group_size, columns.shape[1])

    def settle(self, place: int, own: Tensor) -> Tensor:
        """Rounds the column at `place`, whose values are `own` [N], and keeps its codes."""
        column, gone = self.order[place], self.zeros[place]
        if self.selection is not None:
            gone = gone | ~self.selection.keep(place, self.columns)
        grid = self._grid(column, place)
        scale = grid.scale[:, 0].float()
        zero = None if grid.zero_point is None else grid.zero_point[:, 0].float()
        codes = packing.encode(own.masked_fill(gone, 0.0) / scale, self.scheme.format, zero)
        self.codes[column] = codes
        return packing.decode(codes, self.scheme.format, zero) * scale

    def _grid(self, column: int, place: int) -> Grid:
        """The grid of the column's group, taken from the group's current weights when its first column comes."""
        index = column // self.group_size
        if index not in self.grids:
            if self.fixed is not None:
                self.grids[index] = self.fixed.group(index)
            else:
                members = self.columns[place : place + self.group_size]
                self.grids[index] = rounding.grid(members.t().unsqueeze(1), self.scheme)
        return self.grids[index]

    def quantized(self) -> Quantized:
        """The result; padding holds the code of zero."""
        grids = [self.grids[index] for index in sorted(self.grids)]
        zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
        whole = Grid(torch.cat([grid.scale for grid in grids], 1), torch.cat(zeros, 1) if zeros else None)
        self.codes[self.width :] = zeros[-1][:, 0].float() if zeros else self.scheme.kind.zero
        return rounding.from_codes(self.codes.t().contiguous(), whole, self.scheme, self.width)
