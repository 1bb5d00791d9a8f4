"""Small integers in 32-bit words: value i lies in bits i * bits and up of one long row of bits, lowest first.

GPTQ, AWQ and compressed-tensors all pack like this, along different axes. Widths that do not divide 32 cross words.
"""

import torch
from torch import Tensor

from graphwright import packing


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` unsigned values of each row of int32 words [M, W]; uint8 [M, count].

    >>> unpack_words(torch.tensor([[0x0321]], dtype=torch.int32), bits=4, count=3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    stored = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stored[:, :count].contiguous()
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((stored.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count].contiguous()
    start = torch.arange(count) * bits
    low = stored[:, start // 8].to(torch.int16)
    # The last value may end with the last byte; what is read beyond is masked away.
    high = stored[:, (start // 8 + 1).clamp(max=stored.shape[1] - 1)].to(torch.int16)
    return (((low | (high << 8)) >> (start % 8).to(torch.int16)) & ((1 << bits) - 1)).to(torch.uint8)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [M, C] as int32 words [M, ceil(C * bits / 32)], the inverse of `unpack_words`.

    >>> pack_words(torch.tensor([[1, 2, 3]]), bits=4)
    tensor([[801]], dtype=torch.int32)
    """
    rows, count = values.shape
    size = -(-count * bits // 32)
    place = torch.arange(count) * bits
    words = torch.zeros(rows, size + 1, dtype=torch.int64)
    shifted = values.to(torch.int64) << (place % 32)
    words.index_add_(1, place // 32, shifted & 0xFFFFFFFF)
    words.index_add_(1, place // 32 + 1, shifted >> 32)
    signed = words[:, :size]
    return torch.where(signed >= 1 << 31, signed - (1 << 32), signed).to(torch.int32)


def stored(codes: Tensor, bits: int, group_size: int) -> tuple[Tensor, str]:
    """Unsigned codes [N, K] of `bits` bits in the packed layout, and its format; K is padded to whole groups."""
    format = "int8" if bits > 4 else f"int{bits}"
    kind = packing.FORMATS[format]
    padding = -codes.shape[1] % group_size
    if bits > 4:
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        return torch.nn.functional.pad(signed, (0, padding)), format
    return packing.pack(torch.nn.functional.pad(codes, (0, padding), value=kind.zero), format, group_size), format


def stored_zero(zero: Tensor, bits: int) -> Tensor | None:
    """Unsigned zero points [N, G] as the packed layout holds them, or None if every one is the middle code."""
    middle = 1 << (bits - 1)
    if bool((zero == middle).all()):
        return None
    return (zero.to(torch.int16) - middle).to(torch.int8) if bits > 4 else zero
