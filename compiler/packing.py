"""How low-bit weights lie in memory: the one definition that passes, kernels and backends share.

A weight [N, K] is cut along K into G groups of `group_size`; a K that the group size does not divide is padded
with the code of zero up to the next multiple, and the op ignores the padding. How a code is stored, and what it
stands for, is its `Format`:

- int8: int8 [N, G * group_size];
- int4, int2: uint8 [N, G * group_size / p] with p = 2 or 4 codes to a byte. A group is cut into p runs; run i lies in
  bits i * 8 / p and up, so that one AND and one shift unpack contiguous codes;
- int3: uint8 [N, G * group_size * 3 / 8]. Each group holds its codes' low two bits laid out as int2, then their high
  bits, eight runs to a byte;
- nf4 (the normal quantiles of QLoRA, Dettmers et al. 2023), mxfp4 (E2M1 of the OCP microscaling formats): codes laid
  out as int4 that stand for the entries of a table;
- fp8_e4m3, fp8_e5m2: uint8 [N, G * group_size], the bits of `torch.float8_e4m3fn` and `torch.float8_e5m2`;
- int4_offset: codes laid out as int4 (the blocks of GGUF's Q4_1 and Q4_K).

An integer code stands for `(code - zero_point) * scale` of its group. Zero points are stored as codes are, one to a
byte, or as float16 where they are fractions; a symmetric weight has none, and its code of zero is the format's `zero`.
A code of an offset format stands for `code * scale + offset`, in float32 and in this order; the float32 offsets lie
where zero points do. A code of another format stands for a value times the scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A way to store one number in few bits.

    Attributes:
        name: what ops and recipes call it.
        bits: of one code.
        storage: dtype of the packed tensor.
        low: smallest code.
        high: largest code.
        zero: the code of zero in a symmetric weight.
        largest: magnitude that symmetric scales map the largest weight to.
        unit: number of codes in the smallest whole number of bytes; group sizes are multiples of it.
        table: what each code stands for, where that is not the code itself.
        dtype: the floating-point type whose bits are the codes, if there is one.
        offset: whether what lies in place of zero points is added after scaling.
    """

    name: str
    bits: int
    storage: torch.dtype
    low: int
    high: int
    zero: int
    largest: float
    unit: int
    table: tuple[float, ...] = ()
    dtype: torch.dtype | None = None
    offset: bool = False

    @property
    def integer(self) -> bool:
        """Whether codes are integers less a zero point."""
        return not self.table and self.dtype is None


def _normal_quantiles() -> tuple[float, ...]:
    """Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero; 7 negative and 8 positive."""
    tail = 0.9677083

    def half(steps: int) -> list[float]:
        return [NormalDist().inv_cdf(tail + (0.5 - tail) * i / steps) for i in range(steps)]

    negative, positive = half(7), half(8)
    return tuple(value / positive[0] for value in (*(-v for v in negative), 0.0, *reversed(positive)))


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format("int8", 8, torch.int8, -128, 127, 0, 127, 1),
        Format("int4", 4, torch.uint8, 0, 15, 8, 7, 2),
        Format("int3", 3, torch.uint8, 0, 7, 4, 3, 8),
        Format("int2", 2, torch.uint8, 0, 3, 2, 1, 4),
        Format("nf4", 4, torch.uint8, 0, 15, 7, 1, 2, _normal_quantiles()),
        Format("mxfp4", 4, torch.uint8, 0, 15, 0, 6, 2, E2M1 + tuple(-v for v in E2M1)),
        Format("fp8_e4m3", 8, torch.uint8, 0, 255, 0, 448, 1, dtype=torch.float8_e4m3fn),
        Format("fp8_e5m2", 8, torch.uint8, 0, 255, 0, 57344, 1, dtype=torch.float8_e5m2),
        Format("int4_offset", 4, torch.uint8, 0, 15, 0, 15, 2, offset=True),
    )
}
"""Every weight format by name."""


def pack(codes: Tensor, format: str, group_size: int) -> Tensor:
    """Packs integer codes [N, K] (K a multiple of `group_size`) into storage.

    >>> pack(torch.tensor([[1, 2, 3, 4]]), "int4", group_size=4)
    tensor([[49, 66]], dtype=torch.uint8)
    """
    kind = FORMATS[format]
    if kind.bits == 8:
        return codes.to(kind.storage)
    grouped = codes.to(torch.uint8).unflatten(-1, (-1, group_size))
    if kind.bits == 3:
        return torch.cat([_runs_to_bytes(grouped & 3, 2), _runs_to_bytes(grouped >> 2, 1)], dim=-1).flatten(-2)
    return _runs_to_bytes(grouped, kind.bits).flatten(-2)


def unpack(packed: Tensor, format: str, group_size: int) -> Tensor:
    """The codes [N, K] of `packed`, bit-exact inverse of `pack`.

    >>> unpack(torch.tensor([[49, 66]], dtype=torch.uint8), "int4", group_size=4)
    tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    kind = FORMATS[format]
    if kind.bits == 8:
        return packed
    grouped = packed.unflatten(-1, (-1, group_size * kind.bits // 8))
    if kind.bits == 3:
        low, high = grouped.split([group_size // 4, group_size // 8], dim=-1)
        return (_bytes_to_runs(low, 2) | (_bytes_to_runs(high, 1) << 2)).flatten(-2)
    return _bytes_to_runs(grouped, kind.bits).flatten(-2)


def encode(values: Tensor, format: str, zero: Tensor | float | None = None) -> Tensor:
    """The nearest codes of values that were divided by their scale; float32 whole numbers.

    Args:
        values: any shape, floating point.
        format: a name in `FORMATS`.
        zero: for an integer format, its zero points, broadcast to `values`; None for the format's own zero.
    """
    kind = FORMATS[format]
    if kind.integer:
        return (values + (kind.zero if zero is None else zero)).round_().clamp_(kind.low, kind.high)
    if kind.dtype is not None:
        return values.clamp(-kind.largest, kind.largest).to(kind.dtype).view(torch.uint8).float()
    table, order = torch.tensor(kind.table, device=values.device).sort(stable=True)
    place = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
    return order[place].float()


def decode(codes: Tensor, format: str, zero: Tensor | float | None = None) -> Tensor:
    """What codes stand for, before their scale is applied; the inverse of `encode` up to rounding. float32."""
    kind = FORMATS[format]
    if kind.integer:
        # In place: the head of a vocabulary is the largest tensor of a small model.
        return codes.to(torch.float32, copy=True).sub_(kind.zero if zero is None else zero)
    if kind.dtype is not None:
        return codes.to(torch.uint8).view(kind.dtype).float()
    return torch.tensor(kind.table, device=codes.device)[codes.int()]


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, group_size: int) -> Tensor:
    """Float32 [N, G * group_size] from storage, scales [N, G] and zero points or offsets [N, G] or None."""
    codes = unpack(packed, format, group_size).unflatten(-1, (-1, group_size))
    zero = None if zero_point is None else zero_point.float().unsqueeze(-1)
    if FORMATS[format].offset:
        scaled = decode(codes, format).mul_(scale.float().unsqueeze(-1))
        return (scaled if zero is None else scaled.add_(zero)).flatten(-2)
    return decode(codes, format, zero).mul_(scale.float().unsqueeze(-1)).flatten(-2)


def _runs_to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., g] of `bits` bits to bytes [..., g * bits / 8]: run i of the group lies in bits i * bits and up."""
    runs = codes.unflatten(-1, (8 // bits, -1))
    packed = runs[..., 0, :]
    for index in range(1, 8 // bits):
        packed = packed | (runs[..., index, :] << (index * bits))
    return packed


def _bytes_to_runs(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_runs_to_bytes`."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (index * bits)) & mask for index in range(8 // bits)], dim=-1)
