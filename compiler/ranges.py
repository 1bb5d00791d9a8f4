"""Ranges of static scales: which magnitudes of what calibration meets are represented, and which are clipped.

    minmax       all of them
    percentile   all but a small part of the values (Wu et al. 2020, Integer Quantization for Deep Learning Inference,
                 arXiv:2004.09602, which compares the three)
    mse          the range under which rounding changes the values least, in squares

Values are counted in bins of equal ratio, so that memory does not grow with the calibration data, and ranges between
one value and the largest are known to about a percent whatever their size.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graphwright.ops import quantize_dequantize
from graphwright.ops.quantize_dequantize import LARGEST

Observer = Literal["minmax", "percentile", "mse"]
"""Ways to choose a range."""

PER_OCTAVE, LOWEST, OCTAVES = 64, -24, 44
"""Bins between a magnitude and its double, the logarithm of the first bin, and how many doublings are told apart."""

CANDIDATES = tuple(2 ** (-step / 8) for step in range(97))
"""Parts of the largest magnitude that are compared."""


@dataclass
class Magnitudes:
    """How often each magnitude occurs, float64 [bins], and the largest one of each token."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(PER_OCTAVE * OCTAVES, dtype=torch.float64))
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Adds a batch [tokens, K]."""
        magnitude = rows.abs()
        self.tokens.append(magnitude.amax(1))
        place = ((magnitude.log2() - LOWEST) * PER_OCTAVE).clamp_(0, len(self.counts) - 1).long()
        self.counts += torch.bincount(place.flatten(), minlength=len(self.counts))

    @property
    def largest(self) -> Tensor:
        """The largest magnitude, []."""
        return torch.cat(self.tokens).amax()

    @property
    def spread(self) -> float:
        """How many times larger it is than the largest magnitude of a median token."""
        tokens = torch.cat(self.tokens)
        return float(tokens.amax() / tokens.median().clamp_min(torch.finfo(torch.float32).tiny))


def represented(seen: Magnitudes, observer: Observer, percentile: float, format: str) -> Tensor:
    """The largest magnitude that codes shall reach, float32 [].

    Args:
        seen: what calibration met.
        observer: how it is chosen.
        percentile: of `percentile`: the part of all values, in percent, that is not clipped.
        format: of the codes, a name in `graphwright.ops.quantize_dequantize.LARGEST`.
    """
    if observer == "minmax":
        return seen.largest
    edges = LOWEST + torch.arange(len(seen.counts) + 1, dtype=torch.float64) / PER_OCTAVE
    if observer == "percentile":
        below = seen.counts.cumsum(0) / seen.counts.sum()
        place = int(torch.searchsorted(below, percentile / 100))
        return torch.minimum(2 ** edges[min(place, len(below) - 1) + 1], seen.largest).float()
    middle = torch.minimum(2 ** (edges[:-1] + edges[1:]).div(2), seen.largest).float()
    losses = []
    for part in CANDIDATES:
        scale = (seen.largest * part / LARGEST[format]).clamp_min(torch.finfo(torch.float32).tiny)
        error = quantize_dequantize.reference(middle, scale, format, 0) - middle
        losses.append(float((seen.counts * error.double().square()).sum()))
    return seen.largest * CANDIDATES[losses.index(min(losses))]
