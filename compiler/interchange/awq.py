"""AWQ checkpoints in the GEMM layout of AutoAWQ (Lin et al. 2023, arXiv:2306.00978).

qweight  int32 [K, N / 8]   codes, packed along N in the order 0 2 4 6 1 3 5 7
qzeros   int32 [G, N / 8]   zero points, packed alike
scales   float16 [G, N]

A code stands for (code - zero point) * scale.
"""

from typing import Any

import torch
from torch import Tensor

from graphwright.errors import SourceError
from graphwright.interchange.layer import Layer, storage_group
from graphwright.interchange.packed import Packed
from graphwright.interchange.words import stored, stored_zero, unpack_words

BITS = 4
PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word the eight columns lie."""


class Awq:
    """The method `awq`.

    Raises:
        SourceError: widths or layouts that are not read.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        bits, version = config.get("bits", config.get("w_bit", BITS)), str(config.get("version", "gemm")).lower()
        self.group_size = int(config.get("group_size", config.get("q_group_size", 128)))
        self.notes: list[str] = []
        if bits != BITS:
            raise SourceError(f"AWQ weights of {bits} bits are not read", where=where, fix="Read are 4 bits")
        if version != "gemm":
            raise SourceError(
                f"The AWQ weights are laid out for {version}", where=where, fix="Read is the version gemm"
            )
        self.summary = f"awq, {BITS} bits in groups of {self.group_size}"

    def packed(self, layer: Layer) -> Packed | None:
        """The layer's codes, or None."""
        if layer.get("qweight") is None:
            return None
        rows, width = layer.shape
        if rows % 8:
            raise layer.wrong(f"{layer.name} has {rows} outputs, and AWQ packs eight to a word")
        group_size = storage_group(self.group_size, width, BITS)
        groups = -(-width // group_size)
        codes = _ordered(layer.require("qweight", (width, rows // 8), torch.int32), rows)
        zero = _ordered(layer.require("qzeros", (groups, rows // 8), torch.int32), rows)
        scale = layer.scales("scales", (groups, rows)).t().contiguous()
        weight, format = stored(codes, BITS, group_size)
        return Packed(weight, scale, stored_zero(zero, BITS), format, group_size, width)


def _ordered(words: Tensor, rows: int) -> Tensor:
    """Codes [N, M] from words [M, N / 8]."""
    codes = unpack_words(words, BITS, rows).unflatten(1, (-1, 8))
    return codes[:, :, PLACES].flatten(1).t().contiguous()
