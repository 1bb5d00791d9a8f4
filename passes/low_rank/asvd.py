"""ASVD: SVD of W diag(s), where s_j = (magnitude of input channel j)^alpha, so that channels with outliers stay exact.

The magnitude of a channel is the mean of |x_j| over the calibration tokens.
"""

from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from graphwright.calibration import Hessian
from graphwright.factorizer import Factorizer, Scaling
from graphwright.pass_ import Paper


@dataclass
class Magnitudes(Hessian):
    """X^T X and the sum of |x_j| [K]."""

    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Adds a batch."""
        sums = rows.abs().double().sum(0)
        self.total = self.total + sums if self.count else sums
        super().add(rows)


class Asvd(Factorizer):
    """Factors weights whose columns are scaled by their activations."""

    name = "asvd"
    paper = Paper(
        "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
        "Yuan et al.",
        2023,
        "2312.05821",
    )
    calibrated = True

    alpha: float = Field(0.5, ge=0, le=1, description="power of the magnitudes; 0 is the plain SVD")

    def collector(self) -> Magnitudes:
        """Adds up magnitudes."""
        return Magnitudes()

    def scaling(self, statistics: Magnitudes, width: int) -> Scaling:
        """S = diag(s); channels that are always zero count as the smallest one that is not."""
        magnitude = statistics.total / max(statistics.count, 1)
        alive = magnitude[magnitude > 0]
        smallest = float(alive.min()) if len(alive) else 1.0
        forward = magnitude.clamp(min=smallest) ** self.alpha
        return Scaling(forward, 1 / forward)
