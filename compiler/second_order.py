"""Second-order solving of a layer, column by column, which GPTQ and SparseGPT share.

With H = X X^T over the calibration tokens and U the upper Cholesky factor of its inverse, setting column j from w_j to
q_j and moving every later column k by -(w_j - q_j) / U_jj * U_jk leaves the least ||(W - Q) X|| that the later columns
can reach (Hassibi and Stork 1992; Frantar and Alistarh 2022, arXiv:2208.11580). The updates of columns beyond a block
are applied once per block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from graphwright.errors import PassError
from graphwright.sparsity import Pattern

ATTEMPTS = 5
"""How often the damping grows tenfold when the damped Hessian is still not positive definite."""


def sweep(columns: Tensor, factor: Tensor, block_size: int, settle: Callable[[int, Tensor], Tensor]) -> None:
    """Settles the columns of one weight in order, in place; each one's change is taken over by those that follow.

    Args:
        columns: the weight transposed, float32 [K, N].
        factor: of `inverse_factor`, [K, K], in the order of the columns.
        block_size: columns between two updates of all the rest.
        settle: called with the place of a column and its values [N] as they are by then; returns its final values.
    """
    width = columns.shape[0]
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        errors = []
        for place in range(start, stop):
            own = columns[place]
            final = settle(place, own)
            errors.append((own - final) / factor[place, place])
            columns[place] = final
            columns[place + 1 : stop] -= torch.outer(factor[place, place + 1 : stop], errors[-1])
        columns[stop:] -= factor[start:stop, stop:].t() @ torch.stack(errors)


class Selection:
    """Which weights a sweep keeps: those whose removal costs most, w^2 / U_jj^2, decided just before they are due.

    Columns that belong to one group of an n:m pattern are decided together, other patterns once per block, so that
    each decision sees what the removed weights before it have done to the rest.
    """

    def __init__(self, pattern: Pattern, ratio: float, block_size: int, factor: Tensor) -> None:
        self.pattern = pattern
        self.ratio = ratio
        self.span = pattern.of or aligned(block_size, pattern.columns)
        self.diagonal = factor.diagonal()
        self._start = 0
        self._keep = torch.zeros(0)

    def keep(self, place: int, columns: Tensor) -> Tensor:
        """The rows of the column at `place` that stay, bool [N]; `columns` [K, N] as they are by then."""
        if place % self.span == 0:
            self._start = place
            part = columns[place : place + self.span]
            scores = (part / self.diagonal[place : place + self.span, None]).square()
            self._keep = self.pattern.keep(scores.t(), self.ratio).t()
        return self._keep[place - self._start]


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


def aligned(block_size: int, group_size: int) -> int:
    """A block size such that groups do not straddle blocks, or blocks do not straddle groups."""
    small, large = sorted((block_size, group_size))
    return block_size if large % small == 0 else group_size if group_size > block_size else large // small * small
