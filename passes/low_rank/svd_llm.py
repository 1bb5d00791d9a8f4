"""SVD-LLM: SVD of W S with S S^T = X X^T, so that each truncated singular value costs exactly its square.

With the Cholesky factor S of X X^T, ||(W - A B) X||_F = ||(W - A B) S||_F, and the truncated SVD of W S minimises it:
no factors of the same rank have less output error. What is truncated is the sum of the squares of the values left out.
"""

import torch
from pydantic import Field

from graphwright.calibration import Hessian
from graphwright.errors import PassError
from graphwright.factorizer import Factorizer, Scaling
from graphwright.pass_ import Paper


class SvdLlm(Factorizer):
    """Factors weights in the norm of their outputs."""

    name = "svd_llm"
    paper = Paper(
        "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        "Wang et al.",
        2024,
        "2403.07378",
    )
    calibrated = True

    damping: float = Field(1e-4, gt=0, description="part of the mean diagonal of X^T X that is added to it")

    def scaling(self, statistics: Hessian | None, width: int) -> Scaling:
        """The lower Cholesky factor and its inverse.

        Raises:
            PassError: the damped matrix is not positive definite.
        """
        matrix = statistics.matrix.double()
        damped = matrix + torch.eye(width, dtype=torch.float64) * (self.damping * float(matrix.diagonal().mean()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise PassError(
                f"X^T X is singular, even with damping {self.damping:g}",
                fix="Use more or other calibration samples, or a larger damping",
            )
        identity = torch.eye(width, dtype=torch.float64)
        return Scaling(lower, torch.linalg.solve_triangular(lower, identity, upper=False))
