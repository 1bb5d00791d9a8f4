"""GPTQ: columns are rounded one after another, and each one's error is taken over by the columns that follow.

With H = X X^T over the calibration tokens and U the upper Cholesky factor of its inverse, column j is rounded to q_j
and every later column k moves by -(w_j - q_j) / U_jj * U_jk, which minimises ||(W - Q) X||. The updates of columns
beyond the block are applied once per block. Layers are solved behind the already quantized ones before them.

`act_order` rounds the columns with the largest H_jj first; scales then come from the weights as they were (static
groups), so that codes stay in their columns. Without it each group's scales follow from its updated weights.
"""

import torch
from pydantic import Field
from torch import Tensor

from graphwright import packing, rounding
from graphwright.calibration import Hessian
from graphwright.errors import PassError
from graphwright.pass_ import Paper
from graphwright.rounding import Grid, Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import IntegerQuantizer

ATTEMPTS = 5
"""How often the damping grows tenfold when the damped Hessian is still not positive definite."""


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
        columns = _Columns(wide[:, order].t().contiguous(), order, factor, scheme, width, fixed)
        columns.solve(_aligned(self.block_size, scheme.group(width)))
        return columns.quantized()

    def error(self, weight: Tensor, quantized: Quantized, statistics: Hessian) -> float:
        """Relative error of the layer's output."""
        return rounding.output_error(weight, quantized.dense(), statistics.matrix)


class _Columns:
    """The columns of one weight while they are rounded, transposed: [K, N]."""

    def __init__(
        self, columns: Tensor, order: Tensor, factor: Tensor, scheme: Scheme, width: int, fixed: Grid | None
    ) -> None:
        self.columns = columns
        self.order = order.tolist()
        self.factor = factor
        self.scheme = scheme
        self.width = width
        self.fixed = fixed
        self.group_size = scheme.group(width)
        self.grids: dict[int, Grid] = {}
        self.codes = torch.zeros(-(-width // self.group_size) * self.group_size, columns.shape[1])

    def solve(self, block_size: int) -> None:
        """Rounds all columns, some at a time."""
        for start in range(0, self.width, block_size):
            stop = min(start + block_size, self.width)
            errors = torch.stack([self._round(place, stop) for place in range(start, stop)])
            self.columns[stop:] -= self.factor[start:stop, stop:].t() @ errors

    def _round(self, place: int, stop: int) -> Tensor:
        """Rounds the column at `place`, moves the rest of its block, and returns its scaled error [N]."""
        column, own = self.order[place], self.columns[place]
        grid = self._grid(column, place)
        scale = grid.scale[:, 0].float()
        zero = None if grid.zero_point is None else grid.zero_point[:, 0].float()
        codes = packing.encode(own / scale, self.scheme.format, zero)
        self.codes[column] = codes
        rounded = packing.decode(codes, self.scheme.format, zero) * scale
        error = (own - rounded) / self.factor[place, place]
        self.columns[place + 1 : stop] -= torch.outer(self.factor[place, place + 1 : stop], error)
        return error

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


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor [K, K] of the damped Hessian's inverse; dead channels count as independent.

    Raises:
        PassError: no damping that was tried makes the matrix positive definite.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean * 10**attempt)
        damped.diagonal()[diagonal == 0] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
    raise PassError(
        f"The Hessian is not positive definite, even with damping {damping * 10 ** (ATTEMPTS - 1):g}",
        fix="Use more or other calibration samples, or a larger damping",
    )


def _aligned(block_size: int, group_size: int) -> int:
    """A block size such that groups do not straddle blocks, or blocks do not straddle groups."""
    small, large = sorted((block_size, group_size))
    return block_size if large % small == 0 else group_size if group_size > block_size else large // small * small
