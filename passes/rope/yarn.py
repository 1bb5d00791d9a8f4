"""YaRN: rotations that are fast against the trained context stay, slow ones are interpolated, with a ramp between.

    rotation i makes r = context_length * inv_freq / 2 pi turns within the trained context
    r > beta_fast: inv_freq        r < beta_slow: inv_freq / factor        cosine and sine times 0.1 ln(factor) + 1

The ramp is linear in i between the dimensions of both bounds, as in the authors' code and in checkpoints, not in r.
"""

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from graphwright.pass_ import Paper
from graphwright.passes.rope._frequencies import RopeScaling, rotary_base


class Yarn(RopeScaling):
    """Interpolates by parts and sharpens attention."""

    name = "yarn"
    paper = Paper(
        "YaRN: Efficient Context Window Extension of Large Language Models", "Peng et al.", 2023, "2309.00071"
    )

    beta_fast: float = Field(32, gt=0, description="turns above which a rotation stays")
    beta_slow: float = Field(1, gt=0, description="turns below which a rotation is interpolated")

    @model_validator(mode="after")
    def _ordered(self) -> "Yarn":
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow is {self.beta_slow:g} and must be below beta_fast, {self.beta_fast:g}")
        return self

    def scaled(self, inv_freq: Tensor, context_length: int) -> Tensor:
        """Frequencies between the old ones and those of position interpolation."""
        half, log_base = inv_freq.shape[0], math.log(rotary_base(inv_freq))

        def place(turns: float) -> float:
            return half * math.log(context_length / (turns * 2 * math.pi)) / log_base

        low, high = max(math.floor(place(self.beta_fast)), 0), min(math.ceil(place(self.beta_slow)), 2 * half - 1)
        ramp = ((torch.arange(half) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return inv_freq / self.factor * ramp + inv_freq * (1 - ramp)

    @property
    def temperature(self) -> float:
        """The square root of 1/t in the paper."""
        return 0.1 * math.log(self.factor) + 1
