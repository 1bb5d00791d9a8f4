"""Plain truncated SVD: the nearest matrix of a rank in the Frobenius norm (Eckart and Young 1936). No calibration."""

import torch

from graphwright.calibration import Hessian
from graphwright.factorizer import Factorizer, Scaling
from graphwright.pass_ import Paper


class Svd(Factorizer):
    """Factors weights by their own singular values."""

    name = "svd"
    paper = Paper("The approximation of one matrix by another of lower rank", "Eckart and Young", 1936)

    def scaling(self, statistics: Hessian | None, width: int) -> Scaling:
        """S = I."""
        ones = torch.ones(width, dtype=torch.float64)
        return Scaling(ones, ones)
