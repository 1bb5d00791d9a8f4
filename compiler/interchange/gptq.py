"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and `transformers` write them (Frantar et al. 2022, arXiv:2210.17323).

qweight  int32 [K * bits / 32, N]   codes, packed along K
qzeros   int32 [G, N * bits / 32]   zero points, packed along N; the first version stores them less one
scales   float16 [G, N]
g_idx    int32 [K]                  the group of each column; with act-order no longer column / group size

A code stands for (code - zero point) * scale. Act-order becomes a gather of the layer's input, after which groups lie
in order.
"""

from typing import Any

import torch
from torch import Tensor

from graphwright.errors import SourceError
from graphwright.interchange.layer import Layer, columns_of, storage_group
from graphwright.interchange.packed import Packed
from graphwright.interchange.words import stored, stored_zero, unpack_words

BITS = (2, 3, 4, 8)
FIRST, SECOND = ("gptq", "", None), ("gptq_v2",)


class Gptq:
    """The method `gptq`.

    Raises:
        SourceError: widths, layouts or options that are not read.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.bits, self.group_size = config.get("bits"), int(config.get("group_size", -1))
        self.symmetric = bool(config.get("sym", False))
        self.notes: list[str] = []
        version = config.get("checkpoint_format")
        if self.bits not in BITS:
            raise SourceError(
                f"GPTQ weights of {self.bits} bits are not read", where=where, fix="Read are 2, 3, 4 and 8 bits"
            )
        if version not in (*FIRST, *SECOND) or config.get("is_marlin_format"):
            raise SourceError(
                f"The GPTQ weights are laid out for {version or 'marlin'}",
                where=where,
                fix="Read are the checkpoint formats gptq and gptq_v2",
            )
        if config.get("dynamic"):
            raise SourceError(
                "The GPTQ checkpoint quantizes layers by rules of their own (dynamic), which are not read",
                where=where,
                fix="Quantize every layer alike, or recompile the original model",
            )
        self.less_one = version in FIRST
        self.summary = f"gptq, {self.bits} bits" + (f" in groups of {self.group_size}" if self.group_size > 0 else "")

    def packed(self, layer: Layer) -> Packed | None:
        """The layer's codes, or None."""
        if layer.get("qweight") is None:
            return None
        bits, (rows, width) = self.bits, layer.shape
        if width * bits % 32 or rows * bits % 32:
            raise layer.wrong(f"{layer.name} is {rows} by {width}, which does not fill whole words of {bits} bits")
        group_size = storage_group(self.group_size, width, bits)
        groups = -(-width // group_size)
        codes = unpack_words(layer.require("qweight", (width * bits // 32, rows), torch.int32).t(), bits, width)
        words = layer.require("qzeros", (groups, rows * bits // 32), torch.int32)
        zero = self._zero_points(unpack_words(words, bits, rows).t().contiguous())
        scale = layer.scales("scales", (groups, rows)).t().contiguous()
        columns = self._columns(layer, group_size)
        weight, format = stored(codes if columns is None else codes[:, columns], bits, group_size)
        return Packed(weight, scale, stored_zero(zero, bits), format, group_size, width, columns)

    def _columns(self, layer: Layer, group_size: int) -> Tensor | None:
        if layer.get("g_idx") is None:
            return None
        groups = layer.require("g_idx", (layer.shape[1],), torch.int32, torch.int64)
        return columns_of(groups, group_size, layer)

    def _zero_points(self, written: Tensor) -> Tensor:
        """Zero points from what is written; one less than zero was written as the highest code.

        A symmetric checkpoint has the middle code everywhere. Some writers name the first version and store the
        second, and there the middle code itself says so.
        """
        second = not self.less_one or (self.symmetric and bool((written == 1 << (self.bits - 1)).all()))
        return written if second else (written + 1) & ((1 << self.bits) - 1)
