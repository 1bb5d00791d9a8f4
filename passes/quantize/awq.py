"""AWQ: weights whose inputs are large are scaled up before rounding, and ranges are clipped where that helps.

First, for every tensor that linear layers read, s = (mean|X_j|)^a / normaliser is folded out of its maker and into
the weights; a is searched on a grid that includes 0 (no scaling) for the least ||(Q(W s) / s - W) X|| on kept rows.
Then the layers are rounded to nearest in order, each group's range shrunk by the factor that is best on its own inputs
behind the quantized layers before it.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from graphwright import rounding
from graphwright.calibration import Channels
from graphwright.folding import Site
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.rounding import Grid, Quantized
from graphwright.scale_search import fold_chosen
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import IntegerQuantizer

CHUNK = 1 << 22
"""Weights whose ranges are searched at a time."""


class Awq(IntegerQuantizer):
    """Activation-aware weight scaling and clipping."""

    name = "awq"
    paper = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "Lin et al.",
        2023,
        "2306.00978",
    )
    calibrated = True
    error_of = "outputs"

    steps: int = Field(20, gt=0, description="points of the search for a in [0, 1)")
    clip_steps: int = Field(10, ge=0, description="ranges that are tried; 0 clips nothing")
    clip_limit: float = Field(0.5, gt=0, le=1, description="part of the range that is always kept")
    rows: int = Field(256, gt=0, description="calibration tokens on which both searches compare")

    def run(self, program: Program, context: Context) -> PassResult:
        """Scales, then rounds and clips.

        Raises:
            PassError: see `WeightQuantizer.run`.
        """
        strengths = self.fold(program, context)
        result = super().run(program, context)
        return replace(result, notes={**result.notes, "strengths": strengths})

    def fold(self, program: Program, context: Context) -> dict[str, float]:
        """Searches and folds the scales, which changes nothing yet; returns every a by the name of its tensor.

        Raises:
            PassError: there is nothing to calibrate on, or activations are not finite.
        """
        with Editor(program, self.name, context.fuel) as editor:
            return fold_chosen(self, editor, context, self.rows, self._scale)

    def collector(self) -> Channels:
        """Rows to compare on."""
        return Channels(self.rows)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Channels) -> Quantized:
        """Rounds to nearest over the best range of each group."""
        wide = rounding.grouped(weight, scheme)
        grid = rounding.grid(wide, scheme)
        if self.clip_steps:
            inputs = rounding.grouped(statistics.rows, scheme)
            # A group's share of the output on the kept rows, as a quadratic form of its error.
            moments = torch.einsum("tgk,tgl->gkl", inputs, inputs)
            parts = wide.split(max(1, CHUNK // (wide.shape[1] * wide.shape[2])))
            grid = rounding.grid(wide, scheme, torch.cat([self._shrink(rows, moments, scheme) for rows in parts]))
        return rounding.quantize(weight, scheme, grid)

    def error(self, weight: Tensor, quantized: Quantized, statistics: Channels) -> float:
        """Relative error of the layer's output on the kept rows."""
        rows = statistics.rows
        return rounding.output_error(weight, quantized.dense(), rows.t() @ rows)

    def _scale(self, site: Site, weights: list[Tensor], collected: Channels) -> tuple[float, Tensor | None]:
        """The best a of a site, and its scales [free channels]; None for a = 0."""
        scheme, rows = self.scheme(), collected.rows
        stacked = torch.cat(weights)
        mean = site.shared_maximum(collected.mean).clamp(min=1e-4)
        place = site.free[1]
        best: tuple[float, Tensor | None] = (0.0, None)
        lowest = float("inf")
        for step in range(self.steps):
            strength = step / self.steps
            scale = mean**strength
            scale = scale / (scale.max() * scale.min()).sqrt()
            dense = rounding.nearest(stacked * scale[place], scheme) / scale[place]
            loss = float((rows @ (dense - stacked).t()).square().sum())
            if loss < lowest:
                best, lowest = (strength, scale if step else None), loss
        return best

    def _shrink(self, wide: Tensor, moments: Tensor, scheme: Scheme) -> Tensor:
        """The best part of the range of each group, [N, G]; every group is judged by its own share of the output."""
        best = wide.new_ones(wide.shape[:2])
        lowest = torch.full_like(best, torch.inf)
        for step in range(self.clip_steps + 1):
            part = 1 - (1 - self.clip_limit) * step / self.clip_steps
            grid: Grid = rounding.grid(wide, scheme, part)
            error = grid.values(grid.codes(wide, scheme.format), scheme.format) - wide
            loss = torch.einsum("ngk,gkl->ngl", error, moments).mul_(error).sum(-1)
            best = torch.where(loss < lowest, part, best)
            lowest = torch.minimum(lowest, loss)
        return best
