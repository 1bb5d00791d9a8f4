"""How low-bit weights lie in memory: the one definition that passes, kernels and backends share.

A weight [N, K] is cut along K into G groups of `group_size`; a K that the group size does not divide is padded
with the code of zero up to the next multiple, and the op ignores the padding. Codes are stored

- 8 bit: int8 [N, G * group_size];
- 4 bit: uint8 [N, G * group_size / 2]. Within each group the first half lies in the low nibbles and the second half
  in the high nibbles, so that one AND and one shift unpack a group into two contiguous runs.

A code stands for `(code - zero_point) * scale` of its group. 4-bit codes are 0 … 15; without zero points the zero
code is 8. 8-bit codes are -128 … 127; without zero points the zero code is 0.
"""

import torch
from torch import Tensor

STORAGE = {8: torch.int8, 4: torch.uint8}
"""Storage dtype per bit width."""

ZERO_CODE = {8: 0, 4: 8}
"""The code of zero in a symmetric weight, per bit width."""

CODE_RANGE = {8: (-128, 127), 4: (0, 15)}
"""Smallest and largest code, per bit width."""


def pack(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Packs integer codes [N, K] (K a multiple of `group_size`) into storage.

    >>> pack(torch.tensor([[1, 2, 3, 4]]), bits=4, group_size=4)
    tensor([[49, 66]], dtype=torch.uint8)
    """
    if bits == 8:
        return codes.to(torch.int8)
    grouped = codes.to(torch.uint8).unflatten(-1, (-1, group_size))
    half = group_size // 2
    packed: Tensor = grouped[..., :half] | (grouped[..., half:] << 4)
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes [N, K] of `packed`, bit-exact inverse of `pack`.

    >>> unpack(torch.tensor([[49, 66]], dtype=torch.uint8), bits=4, group_size=4)
    tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    if bits == 8:
        return packed
    grouped = packed.unflatten(-1, (-1, group_size // 2))
    return torch.cat([grouped & 15, grouped >> 4], dim=-1).flatten(-2)


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Float32 [N, G * group_size] from storage, scales [N, G] and zero points [N, G] or None."""
    codes = unpack(packed, bits, group_size).unflatten(-1, (-1, group_size)).float()
    zero = ZERO_CODE[bits] if zero_point is None else zero_point.float().unsqueeze(-1)
    # In place: the head of a vocabulary is the largest tensor of a small model.
    return codes.sub_(zero).mul_(scale.float().unsqueeze(-1)).flatten(-2)
