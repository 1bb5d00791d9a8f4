"""SmoothQuant: outliers of the activations move into the weights, so that both round well to 8 bits.

Each channel j of what linear layers read is divided by s_j = max|X_j|^a / max|W_j|^(1-a) where a norm or a linear layer
makes it, and the weights that read it are multiplied by s_j; the function stays what it is. One s serves all layers
that read the tensor. Without a migration strength it is searched per tensor: the a of a grid under which rounding
weights per row and activations per token to 8 bits changes the output least on kept rows of the calibration data.
"""

import torch
from pydantic import Field
from torch import Tensor

from graphwright.calibration import Channels
from graphwright.folding import Site
from graphwright.ops import quantize_dequantize
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.rounding import nearest
from graphwright.scale_search import fold_chosen
from graphwright.scheme import Scheme

ROWS = 256
"""Calibration tokens on which strengths are compared."""

GRID = tuple(step / 20 for step in range(4, 20))


class Smoothquant(Pass):
    """Migration of activation outliers into weights."""

    name = "smoothquant"
    kind = "exact"
    paper = Paper(
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        "Xiao et al.",
        2022,
        "2211.10438",
    )
    requires = ("linear",)
    after = ("float_dtype", "rope", "attention", "gated_activation")
    provides = ("folded",)

    strength: float | None = Field(None, ge=0, le=1, description="a of the paper; searched per tensor when left out")

    @property
    def calibrates(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Smooths every tensor that linear layers other than the vocabulary head read.

        Raises:
            PassError: there is nothing to calibrate on, or activations are not finite.
        """
        with Editor(program, self.name, context.fuel) as editor:
            strengths = fold_chosen(self, editor, context, ROWS, self._scale)
        return PassResult(program, editor.sites, notes={"strengths": strengths})

    def _scale(self, site: Site, weights: list[Tensor], collected: Channels) -> tuple[float, Tensor]:
        """The best strength of a site, and its scales [free channels]."""
        largest_weight = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        candidates = GRID if self.strength is None else (self.strength,)
        if len(candidates) == 1:
            return candidates[0], self._scales(site, collected.largest, largest_weight, candidates[0])
        rows, stacked = collected.rows, torch.cat(weights)
        expected = rows @ stacked.t()
        losses = []
        for strength in candidates:
            scale = self._scales(site, collected.largest, largest_weight, strength)
            losses.append(_loss(rows, stacked, expected, scale[site.free[1]]))
        best = candidates[losses.index(min(losses))]
        return best, self._scales(site, collected.largest, largest_weight, best)

    def _scales(self, site: Site, largest: Tensor, largest_weight: Tensor, strength: float) -> Tensor:
        activation = site.shared_maximum(largest).clamp(min=1e-5)
        weight = site.shared_maximum(largest_weight).clamp(min=1e-5)
        return activation**strength / weight ** (1 - strength)


def _loss(rows: Tensor, weight: Tensor, expected: Tensor, scale: Tensor) -> float:
    smooth = nearest(weight * scale, Scheme(format="int8", group_size=0, symmetric=True, scale_dtype="float32"))
    rounded = quantize_dequantize.reference(rows / scale, None, "int8", 0)
    return float((rounded @ smooth.t() - expected).square().sum())
