"""SpQR: small groups whose scales are quantized too, and the few weights that round badly kept beside them.

    before                  after
    y = linear(x, W, b)     y = spqr_linear(x, codes, scale codes, zero point codes, statistics, sparse rows, b)

A weight's rounding error counts as (w - q)^2 / U_jj^2, with U the Cholesky factor of GPTQ's sweep. A weight is taken
out of the range of its group if without it the errors of the whole group fall by more than the threshold, and is an
outlier if its own error exceeds the threshold when its column is rounded: what it lacks is stored in float16, and
nothing is left for later columns to take over. The scales and zero points [N, G] are rounded to a few bits themselves,
`statistic_group` outputs at a time, before any weight is. Bits per weight: bits + 2 * statistic_bits / group_size +
64 / (group_size * statistic_group) + 32 for each outlier.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import packing, rounding
from graphwright.calibration import Hessian
from graphwright.errors import PassError
from graphwright.ops import spqr_linear
from graphwright.ops.spqr_linear import dense_part, merged
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.quantize.gptq import Columns
from graphwright.program import Program
from graphwright.rounding import Grid, Quantized
from graphwright.scheme import Scheme
from graphwright.second_order import aligned, inverse_factor, sweep
from graphwright.weight_quantizer import Installation, Layer, WeightQuantizer, integer_format

CHUNK = 1 << 22
"""Weights whose groups are searched for outliers at a time."""


@dataclass(frozen=True)
class SpqrWeight:
    """A weight [N, K] as `spqr_linear` reads it; the tensors are described there."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    statistics: Tensor
    values: Tensor
    columns: Tensor
    starts: Tensor
    layout: tuple[str, int, str, int]
    width: int

    def dense(self) -> Tensor:
        """The weight [N, K] that it stands for, float32."""
        dense = dense_part(self.packed, self.scale, self.zero_point, self.statistics, *self.layout)
        return merged(dense[:, : self.width], self.values, self.columns, self.starts)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        names = ("packed", "scale", "zero_point", "statistics", "values", "columns", "starts")
        return {name: getattr(self, name) for name in names}

    @property
    def bits(self) -> float:
        """Bits stored per weight."""
        stored = sum(tensor.nbytes for tensor in self.tensors().values())
        return stored * 8 / (self.packed.shape[0] * self.width)


class Spqr(WeightQuantizer):
    """Dense low-bit weights with two-level scales, and sparse outliers."""

    name = "spqr"
    paper = Paper(
        "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
        "Dettmers et al.",
        2023,
        "2306.03078",
    )
    calibrated = True
    error_of = "outputs"
    # Zero is no code of a grid whose zero points are rounded, so a pruned weight would not stay pruned.
    conflicts = (*WeightQuantizer.conflicts, "sparse")

    bits: Literal[2, 3, 4] = Field(3, description="bits per weight")
    group_size: int = Field(16, gt=0, description="weights that share a scale along the input")
    statistic_bits: Literal[2, 3, 4, 8] = Field(3, description="bits of each scale and zero point")
    statistic_group: int = Field(16, gt=0, description="outputs whose scales share a scale")
    threshold: float = Field(
        0.2, gt=0, description="squared error, relative to the mean square of a weight, from which on one is an outlier"
    )
    damping: float = Field(0.01, gt=0, description="part of the Hessian's mean diagonal that is added to it")
    block_size: int = Field(128, gt=0, description="columns between two updates of the rest")
    act_order: bool = Field(True, description="most important columns first")

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Its layout is one of its own, whatever its bits."""
        return ("spqr", *super().weight_formats)

    def model_post_init(self, context: Any) -> None:
        """Refuses options that make no scheme, and those of layers that are not SpQR's."""
        super().model_post_init(context)
        for pattern, options in self.layers.items():
            made = options.apply(self.scheme())
            if made is not None and (made.symmetric or not made.kind.integer or made.group_size < 1):
                raise ValueError(f"layers {pattern!r}: SpQR rounds to integers with zero points in groups")
        unit = packing.FORMATS[integer_format(self.statistic_bits)].unit
        if self.statistic_group % unit:
            raise ValueError(f"statistic_group must be a multiple of {unit} for scales of {self.statistic_bits} bits")

    def scheme(self) -> Scheme:
        """Integers with zero points in small groups."""
        return Scheme(format=integer_format(self.bits), group_size=self.group_size, scale_dtype=self.scale_dtype)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds; notes the mean bits per weight and the part of the weights that are outliers."""
        result = super().run(program, context)
        weights = stored = outliers = 0
        for node in program.calls(spqr_linear.target):
            parts = [program.weight(part) for part in node.args[1:8]]
            weights += parts[0].shape[0] * int(node.args[0].meta["val"].shape[-1])
            stored += sum(part.nbytes for part in parts)
            outliers += parts[4].numel()
        if weights:
            result.notes.update(bits_per_weight=stored * 8 / weights, outliers=outliers / weights)
        return result

    def collector(self) -> Hessian:
        """X^T X."""
        return Hessian()

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Hessian) -> SpqrWeight:
        """Rounds one weight.

        Raises:
            PassError: the Hessian is not positive definite, however it is damped, or the weight is not finite.
        """
        if not weight.isfinite().all():
            raise PassError("A weight is NaN or infinite", fix="Give a checkpoint that is whole")
        importance = statistics.matrix.diagonal()
        wide = weight.float().masked_fill(importance == 0, 0.0)
        width = wide.shape[1]
        order = importance.argsort(descending=True, stable=True) if self.act_order else torch.arange(width)
        factor = inverse_factor(statistics.matrix[order][:, order], self.damping)
        cost = torch.empty(width)
        cost[order] = factor.diagonal().square().reciprocal()
        threshold = self.threshold * float((wide.square().mean(0) * cost).mean())
        outer = self._grid(wide, cost, scheme, threshold)
        columns = SparseColumns(wide[:, order].t().contiguous(), order, scheme, outer.grid())
        columns.allow(factor.diagonal(), threshold)
        sweep(columns.columns, factor, aligned(self.block_size, scheme.group(width)), columns.settle)
        return columns.stored(outer)

    def solve_expert(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Experts are rounded to nearest: their kernels take no outliers beside the codes."""
        return rounding.quantize(weight, scheme)

    def restore(self, tensors: dict[str, Tensor], scheme: Scheme, width: int) -> SpqrWeight:
        """From a checkpoint."""
        layout = (scheme.format, scheme.group(width), integer_format(self.statistic_bits), self.statistic_group)
        return SpqrWeight(**tensors, layout=layout, width=width)

    def install(self, edit: Installation, layer: Layer, solved: SpqrWeight) -> fx.Node:
        """Puts the op in the place of the layer."""
        stored = solved.tensors()
        stored = {layer.scheme.format: stored.pop("packed"), **stored}
        nodes = edit.read(layer.name, layer.scheme, stored, layer.node)
        bias = layer.node.args[2] if len(layer.node.args) > 2 else None
        new = edit.editor.call(spqr_linear, layer.node.args[0], *nodes, bias, *solved.layout, before=layer.node)
        edit.editor.replace(layer.node, new, f"{layer.name}: {solved.bits:.2f} bits, {len(solved.values)} outliers")
        return new

    def error(self, weight: Tensor, quantized: SpqrWeight, statistics: Hessian) -> float:
        """Relative error of the layer's output."""
        return rounding.output_error(weight, quantized.dense(), statistics.matrix)

    def _grid(self, wide: Tensor, cost: Tensor, scheme: Scheme, threshold: float) -> "TwoLevels":
        """The rounded scales and zero points of all groups, over ranges without outliers."""
        grouped, missing = rounding.grouped(wide, scheme), -wide.shape[1] % scheme.group(wide.shape[1])
        costs = torch.cat([cost, cost.new_zeros(missing)]).unflatten(0, grouped.shape[1:])
        step = max(1, CHUNK // wide.shape[1])
        ranges = [ranges_without_outliers(part, costs, scheme, threshold) for part in grouped.split(step)]
        low, high = (torch.cat(parts).t().contiguous() for parts in zip(*ranges, strict=True))
        return TwoLevels.of(low, high, scheme, integer_format(self.statistic_bits), self.statistic_group)


def ranges_without_outliers(wide: Tensor, cost: Tensor, scheme: Scheme, threshold: float) -> tuple[Tensor, Tensor]:
    """The least and largest weight of each group [N, G] that is no outlier.

    Args:
        wide: weights [N, G, group_size].
        cost: what a squared error costs, [G, group_size]; zero for padding.
        scheme: of the codes.
        threshold: the fall of a group's cost from which on a weight stays out of the range.
    """
    codes = scheme.kind.high - scheme.kind.low
    padding = cost == 0
    low, high = wide.masked_fill(padding, torch.inf), wide.masked_fill(padding, -torch.inf)
    base = (_errors(wide, _finite(low.amin(-1)), _finite(high.amax(-1)), codes) * cost).sum(-1)
    outlier = torch.zeros_like(wide, dtype=torch.bool)
    for index in range(wide.shape[2]):
        without = torch.ones(wide.shape[2], dtype=torch.bool)
        without[index] = False
        rest = _finite(low[..., without].amin(-1)), _finite(high[..., without].amax(-1))
        left = (_errors(wide[..., without], rest[0], rest[1], codes) * cost[:, without]).sum(-1)
        outlier[..., index] = base - left > threshold
    # Where every weight is one, the range is that of all of them.
    outlier &= ~(outlier | padding).all(-1, keepdim=True)
    return _finite(low.masked_fill(outlier, torch.inf).amin(-1)), _finite(
        high.masked_fill(outlier, -torch.inf).amax(-1)
    )


def _finite(bound: Tensor) -> Tensor:
    """A bound of groups, with 0 for those that hold padding only."""
    return bound.masked_fill(bound.isinf(), 0.0)


def _errors(wide: Tensor, low: Tensor, high: Tensor, codes: int) -> Tensor:
    """Squared errors of rounding to the nearest of `codes` + 1 values between two bounds [N, G]."""
    step = ((high - low) / codes).clamp(min=1e-30).unsqueeze(-1)
    low = low.unsqueeze(-1)
    return ((wide - low) / step).round_().clamp_(0, codes).mul_(step).add_(low).sub_(wide).square_()


@dataclass(frozen=True)
class TwoLevels:
    """Rounded scales and zero points: their codes [G, N padded], and the statistics [4, G, blocks] of `spqr_linear`."""

    scale: Tensor
    zero_point: Tensor
    statistics: Tensor
    format: str
    group: int
    rows: int

    @staticmethod
    def of(low: Tensor, high: Tensor, scheme: Scheme, format: str, group: int) -> "TwoLevels":
        """From the ranges [G, N] of the groups; zero points follow from the rounded scales.

        Raises:
            PassError: the weight is not finite, or too large for the scheme's scales.
        """
        codes = scheme.kind.high - scheme.kind.low
        step = (high - low) / codes
        # A group of equal weights: the scale is the weight, and its code is one off the zero point.
        step = torch.where(step > 0, step, torch.where(low == 0, 1.0, low.abs()))
        packed_scale, scales, scale_grid = _rounded(step, format, group, scheme)
        zero = scheme.kind.low - low / torch.where(scales == 0, 1.0, scales)
        packed_zero, _, zero_grid = _rounded(zero, format, group, scheme)
        return TwoLevels(packed_scale, packed_zero, torch.cat([scale_grid, zero_grid]), format, group, low.shape[1])

    def grid(self) -> Grid:
        """What the codes stand for: scales and zero points [N, G], float32."""
        scale, zero = (
            packing.dequantize(packed, self.statistics[first], self.statistics[first + 1], self.format, self.group)
            for packed, first in ((self.scale, 0), (self.zero_point, 2))
        )
        # A scale that rounds to zero makes all weights of its group zero; dividing by it must not make NaN.
        scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
        return Grid(scale[:, : self.rows].t(), zero[:, : self.rows].t())


def _rounded(values: Tensor, format: str, group: int, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes of values [G, N] in groups along N, what they stand for, and scale and zero point [2, G, blocks]."""
    kind, count = packing.FORMATS[format], values.shape[1]
    # The last group is filled up with the last value, which widens no range.
    wide = torch.cat([values, values[:, -1:].expand(-1, -count % group)], 1).unflatten(1, (-1, group))
    low, high = wide.amin(-1), wide.amax(-1)
    step = (high - low) / (kind.high - kind.low)
    # Nearly equal values: a step that float16 can tell from the values keeps the zero point small.
    step = torch.maximum(step, torch.maximum(low.abs(), high.abs()) / 1024)
    step = torch.where(step == 0, 1.0, step).to(scheme.scale_type)
    zero = (kind.low - low / step.float()).to(scheme.scale_type)
    grid = torch.stack([step, zero])
    if not grid.isfinite().all() or (step == 0).any():
        raise PassError(
            f"A weight is not finite, or its scales do not fit {scheme.scale_dtype}", fix="Use scale_dtype: float32"
        )
    made = Grid(step, zero)
    codes = made.codes(wide, format)
    packed = packing.pack(codes.flatten(1), format, group)
    return packed, made.values(codes, format).flatten(1)[:, :count], grid


class SparseColumns(Columns):
    """Columns that keep what a badly rounded weight lacks."""

    def __init__(self, columns: Tensor, order: Tensor, scheme: Scheme, grid: Grid) -> None:
        super().__init__(columns, order, scheme, grid, None)
        self.lacks = torch.zeros_like(columns)

    def allow(self, diagonal: Tensor, threshold: float) -> None:
        """Sets the cost from which on a weight is an outlier; `diagonal` [K] is the factor's, in the sweep's order."""
        self.limit = threshold * diagonal.square()

    def settle(self, place: int, own: Tensor) -> Tensor:
        """Rounds a column and gives outliers what they lack."""
        value = super().settle(place, own)
        missing = (own - value).half().float()
        outlier = ((own - value).square() > self.limit[place]) & missing.isfinite()
        self.lacks[self.order[place]] = missing.masked_fill(~outlier, 0.0)
        return value + self.lacks[self.order[place]]

    def stored(self, outer: TwoLevels) -> SpqrWeight:
        """The result; padding holds any code, as nothing reads it."""
        packed = packing.pack(self.codes.t().contiguous(), self.scheme.format, self.group_size)
        lacks = self.lacks.t()
        rows, places = lacks.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(lacks.shape[0] + 1)).int()
        index = torch.int16 if self.width <= torch.iinfo(torch.int16).max + 1 else torch.int32
        layout = (self.scheme.format, self.group_size, outer.format, outer.group)
        sparse = (lacks[rows, places].half(), places.to(index), starts)
        return SpqrWeight(packed, outer.scale, outer.zero_point, outer.statistics, *sparse, layout, self.width)
