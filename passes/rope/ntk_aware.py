"""NTK-aware interpolation: a larger base, so that slow rotations are squeezed and fast ones hardly change.

    base * factor^(d / (d - 2))        the slowest is divided by the factor, the fastest stays

Proposed by bloc97 in 2023; written up in section 3.1 of YaRN.
"""

import torch
from torch import Tensor

from graphwright.pass_ import Paper
from graphwright.passes.rope._frequencies import RopeScaling


class NtkAware(RopeScaling):
    """Frequency i is divided by factor^(2i / (d - 2))."""

    name = "ntk_aware"
    paper = Paper(
        "YaRN: Efficient Context Window Extension of Large Language Models", "Peng et al.", 2023, "2309.00071"
    )

    def scaled(self, inv_freq: Tensor, context_length: int) -> Tensor:
        """The frequencies of the larger base."""
        half = inv_freq.shape[0]
        exponents = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
        return (inv_freq.double() / self.factor**exponents).float()
