"""How low-bit weights lie in memory: the one definition that passes, kernels and backends share.

A weight [N, K] is cut along K into G groups of `group_size`; a K that the group size does not divide is padded
with the code of zero up to the next multiple, and the op ignores the padding. How a code is stored, and what it
stands for, is its `Format`:

- int8: int8 [N, G * group_size];
- int4: uint8 [N, G * group_size / 2]. Within each group the first half lies in the low nibbles and the second half
  in the high nibbles, so that one AND and one shift unpack a group into two contiguous runs.

A code stands for `(code - zero_point) * scale` of its group; a symmetric weight has no zero points, and its code of
zero is the format's `zero`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """

    name: str
    bits: int
    storage: torch.dtype
    low: int
    high: int
    zero: int


FORMATS: Mapping[str, Format] = {
    f.name: f for f in (Format("int8", 8, torch.int8, -128, 127, 0), Format("int4", 4, torch.uint8, 0, 15, 8))
}
"""Every weight format by name."""


def pack(codes: Tensor, format: str, group_size: int) -> Tensor:
    """Packs integer codes [N, K] (K a multiple of `group_size`) into storage.

    >>> pack(torch.tensor([[1, 2, 3, 4]]), "int4", group_size=4)
    tensor([[49, 66]], dtype=torch.uint8)
    """
    if format == "int8":
        return codes.to(torch.int8)
    grouped = codes.to(torch.uint8).unflatten(-1, (-1, group_size))
    half = group_size // 2
    packed: Tensor = grouped[..., :half] | (grouped[..., half:] << 4)
    return packed.flatten(-2)


def unpack(packed: Tensor, format: str, group_size: int) -> Tensor:
    """The codes [N, K] of `packed`, bit-exact inverse of `pack`.

    >>> unpack(torch.tensor([[49, 66]], dtype=torch.uint8), "int4", group_size=4)
    tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    if format == "int8":
        return packed
    grouped = packed.unflatten(-1, (-1, group_size // 2))
    return torch.cat([grouped & 15, grouped >> 4], dim=-1).flatten(-2)


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, group_size: int) -> Tensor:
    """Float32 [N, G * group_size] from storage, scales [N, G] and zero points [N, G] or None."""
    codes = unpack(packed, format, group_size).unflatten(-1, (-1, group_size)).float()
    zero = FORMATS[format].zero if zero_point is None else zero_point.float().unsqueeze(-1)
    # In place: the head of a vocabulary is the largest tensor of a small model.
    return codes.sub_(zero).mul_(scale.float().unsqueeze(-1)).flatten(-2)
