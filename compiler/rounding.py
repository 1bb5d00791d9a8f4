"""Rounding a weight matrix to a scheme: the scales, the codes and what the codes stand for.

Symmetric: scale = max|w| / largest. Asymmetric: scale = (max - min) / (2^bits - 1) over a range that contains zero, so
that zero is exact (Jacob et al. 2018, arXiv:1712.05877). Every method of `passes/quantize` rounds with these functions
and differs in what it does to the weights, scales and zero points before.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing
from graphwright.errors import PassError
from graphwright.scheme import WHOLE_TENSOR, Scheme

CHUNK = 1 << 20
"""Weights quantized at a time: the head of a vocabulary is the largest tensor of a small model."""


@dataclass(frozen=True)
class Grid:
    """Scales [N, G] in the scheme's dtype, and zero points [N, G] as codes or fractions of one, or None."""

    scale: Tensor
    zero_point: Tensor | None

    def codes(self, wide: Tensor, format: str) -> Tensor:
        """Codes of weights [N, G, group_size], float32."""
        return packing.encode(wide / self.scale.float().unsqueeze(-1), format, self._zero())

    def values(self, codes: Tensor, format: str) -> Tensor:
        """What codes [N, G, group_size] stand for, float32."""
        return packing.decode(codes, format, self._zero()).mul_(self.scale.float().unsqueeze(-1))

    def rows(self, start: int, stop: int) -> "Grid":
        """The grid of some rows."""
        return Grid(self.scale[start:stop], None if self.zero_point is None else self.zero_point[start:stop])

    def group(self, index: int) -> "Grid":
        """The grid [N, 1] of one group."""
        zero = None if self.zero_point is None else self.zero_point[:, index : index + 1]
        return Grid(self.scale[:, index : index + 1], zero)

    def _zero(self) -> Tensor | None:
        return None if self.zero_point is None else self.zero_point.float().unsqueeze(-1)


@dataclass(frozen=True)
class Quantized:
    """A packed weight with its grid.

    Attributes:
        packed: storage of the scheme's format for [N, G * group_size].
        grid: scales and zero points.
        scheme: what it was rounded to.
        width: K, without padding.
    """

    packed: Tensor
    grid: Grid
    scheme: Scheme
    width: int

    @property
    def group_size(self) -> int:
        """Weights that share a scale, in storage."""
        return self.scheme.group(self.width)

    def dense(self) -> Tensor:
        """The weight [N, K] that it stands for, float32."""
        parts = (self.packed, self.grid.scale, self.grid.zero_point, self.scheme.format, self.group_size)
        return packing.dequantize(*parts)[:, : self.width]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        zero = {} if self.grid.zero_point is None else {"zero_point": self.grid.zero_point}
        return {"packed": self.packed, "scale": self.grid.scale, **zero}

    @staticmethod
    def restore(tensors: dict[str, Tensor], scheme: Scheme, width: int) -> "Quantized":
        """From its `tensors`."""
        return Quantized(tensors["packed"], Grid(tensors["scale"], tensors.get("zero_point")), scheme, width)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """Float32 [N, G, group_size] of a weight [N, K], padded with zeros."""
    group_size = scheme.group(weight.shape[1])
    wide, missing = weight.float(), -weight.shape[1] % group_size
    return (functional.pad(wide, (0, missing)) if missing else wide).unflatten(1, (-1, group_size))


def grid(wide: Tensor, scheme: Scheme, shrink: Tensor | float = 1.0) -> Grid:
    """The grid of weights [N, G, group_size] over their range, which `shrink` (broadcast to [N, G]) makes smaller.

    Raises:
        PassError: the weight holds NaN or infinity, or a scale overflows the scheme's dtype.
    """
    kind = scheme.kind
    if scheme.symmetric:
        peak = wide.abs().amax(-1) * shrink
        if scheme.group_size == WHOLE_TENSOR:
            peak = peak.amax().expand_as(peak)
        scale = peak / kind.largest
        if kind.name == "mxfp4":
            # The scale of a microscaling block is a power of two; rounded up, so that nothing is clipped.
            scale = torch.where(scale > 0, torch.exp2(scale.log2().ceil()), scale)
        return Grid(_stored(scale, scheme), None)
    smallest, largest = wide.amin(-1).clamp(max=0) * shrink, wide.amax(-1).clamp(min=0) * shrink
    scale = _stored((largest - smallest) / (kind.high - kind.low), scheme)
    zero = (kind.low - smallest / scale.float()).clamp(kind.low, kind.high)
    return Grid(scale, zero.half() if scheme.zero_dtype == "float16" else zero.round().to(kind.storage))


def quantize(weight: Tensor, scheme: Scheme, chosen: Grid | None = None) -> Quantized:
    """Rounds a weight [N, K] to the nearest codes, of `chosen` or of the grid over its range.

    Raises:
        PassError: the weight holds NaN or infinity, or a scale overflows the scheme's dtype.
    """
    width, parts = weight.shape[1], []
    if chosen is None and scheme.group_size == WHOLE_TENSOR:
        chosen = grid(grouped(weight, scheme), scheme)
    step = max(1, CHUNK // width)
    for start in range(0, weight.shape[0], step):
        rows = grouped(weight[start : start + step], scheme)
        part = grid(rows, scheme) if chosen is None else chosen.rows(start, start + step)
        codes = part.codes(rows, scheme.format).flatten(1)
        parts.append((packing.pack(codes, scheme.format, scheme.group(width)), part))
    zeros = [part.zero_point for _, part in parts if part.zero_point is not None]
    merged = Grid(torch.cat([part.scale for _, part in parts]), torch.cat(zeros) if zeros else None)
    return Quantized(torch.cat([packed for packed, _ in parts]), merged, scheme, width)


def nearest(weight: Tensor, scheme: Scheme) -> Tensor:
    """What a weight [N, K] rounds to, float32 [N, K]: `quantize(weight, scheme).dense()` without packing.

    Raises:
        PassError: the weight holds NaN or infinity, or a scale overflows the scheme's dtype.
    """
    wide = grouped(weight, scheme)
    made = grid(wide, scheme)
    return made.values(made.codes(wide, scheme.format), scheme.format).flatten(1)[:, : weight.shape[1]]


def from_codes(codes: Tensor, chosen: Grid, scheme: Scheme, width: int) -> Quantized:
    """Packs codes [N, G * group_size] that a method chose itself."""
    return Quantized(packing.pack(codes, scheme.format, scheme.group(width)), chosen, scheme, width)


def relative_weight_error(weight: Tensor, quantized: Quantized) -> float:
    """||W - Q|| / ||W||, some rows at a time."""
    error = norm = 0.0
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        stop = start + step
        part = replace(quantized, packed=quantized.packed[start:stop], grid=quantized.grid.rows(start, stop))
        error += float(part.dense().sub_(rows).square_().sum())
        norm += float(rows.square().sum())
    return (error / max(norm, 1e-30)) ** 0.5


def output_error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """||(W - Q) X|| / ||W X|| from X X^T [K, K]."""
    wide = weight.float()
    difference = dense - wide
    error = float((difference @ hessian).mul_(difference).sum())
    norm = float((wide @ hessian).mul_(wide).sum())
    return (max(error, 0.0) / max(norm, 1e-30)) ** 0.5


def _stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales as they are stored; a group of zeros gets the scale 1, and tiny scales do not vanish."""
    dtype = scheme.scale_type
    smallest = torch.finfo(dtype).tiny
    stored = torch.where(scale == 0, 1.0, scale.clamp(min=smallest)).to(dtype)
    if not stored.isfinite().all():
        raise PassError(
            f"A weight is not finite, or too large for {scheme.scale_dtype} scales", fix="Use scale_dtype: float32"
        )
    return stored
