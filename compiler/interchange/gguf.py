"""GGUF files: blocks of Q4_0, Q4_1, Q8_0, Q4_K and Q6_K become packed weights of exactly the same numbers.

    type   a block                                            packed form
    Q4_0   32 codes less 8, float16 scale                      int4, groups of 32, symmetric
    Q4_1   32 codes, float16 scale and minimum                 int4_offset, groups of 32
    Q8_0   32 signed codes, float16 scale                      int8, groups of 32, symmetric
    Q4_K   256 codes; 8 scales and minima of 6 bits, times     int4_offset, groups of 32, float32 scales
           float16 ones of the block
    Q6_K   256 codes less 32; 16 signed scales of 8 bits,      int8, groups of 16, float32 scales
           times a float16 one of the block

The products of a block's scale with the scales inside it are exact in float32, so the packed weight dequantizes to the
numbers of `gguf.quants.dequantize`, bit for bit. Tensors of other types are dequantized, which is noted. Names, and the
order of rows that llama.cpp gives query and key weights for its rotary embedding, are translated by what
`transformers` knows of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright import packing
from graphwright.errors import SourceError
from graphwright.interchange.packed import Packed

FLOATS = ("F32", "F16", "BF16")

MATRIX = 2
"""Dimensions of a weight; one with more holds those of all experts of a layer."""

Blocks = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [N, blocks of a row, bytes of a block]."""


@dataclass(frozen=True)
class Unpacked:
    """What the blocks of a tensor hold: codes [N, K], scales [N, G] and offsets [N, G] or None."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    format: str
    group_size: int

    def rows(self, order: Tensor | None) -> "Unpacked":
        """With rows in another order."""
        if order is None:
            return self
        offset = None if self.offset is None else self.offset[order]
        return Unpacked(self.codes[order], self.scale[order], offset, self.format, self.group_size)

    def packed(self) -> Packed:
        """In the packed layout."""
        weight = packing.pack(self.codes, self.format, self.group_size).contiguous()
        offset = None if self.offset is None else self.offset.contiguous()
        width = self.codes.shape[1]
        return Packed(weight, self.scale.contiguous(), offset, self.format, self.group_size, width)


def _half(blocks: Blocks, start: int) -> Tensor:
    """A float16 of each block, [N, blocks]."""
    return torch.from_numpy(blocks[..., start : start + 2].copy().view(np.float16)[..., 0])


def _nibbles(blocks: Blocks, start: int, run: int) -> Tensor:
    """Codes [N, K] of blocks: `run` low nibbles, then the high nibbles of the same bytes, and so on."""
    stored = torch.from_numpy(blocks[..., start:].copy()).unflatten(-1, (-1, 1, run))
    return torch.cat([stored & 15, stored >> 4], dim=-2).flatten(1)


def _q4_0(blocks: Blocks) -> Unpacked:
    return Unpacked(_nibbles(blocks, 2, 16), _half(blocks, 0), None, "int4", 32)


def _q4_1(blocks: Blocks) -> Unpacked:
    return Unpacked(_nibbles(blocks, 4, 16), _half(blocks, 0), _half(blocks, 2).float(), "int4_offset", 32)


def _q8_0(blocks: Blocks) -> Unpacked:
    codes = torch.from_numpy(blocks[..., 2:].copy().view(np.int8)).flatten(1)
    return Unpacked(codes, _half(blocks, 0), None, "int8", 32)


def _q4_k(blocks: Blocks) -> Unpacked:
    """Twelve bytes hold eight 6-bit scales and minima: four of each whole, four in nibbles with their high bits."""
    first, second, last = torch.from_numpy(blocks[..., 4:16].copy()).unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat([first & 63, (last & 15) | ((first >> 2) & 48)], dim=-1)
    minimum = torch.cat([second & 63, (last >> 4) | ((second >> 2) & 48)], dim=-1)
    scale = _half(blocks, 0).float().unsqueeze(-1) * scale.float()
    offset = _half(blocks, 2).float().unsqueeze(-1) * minimum.float()
    return Unpacked(_nibbles(blocks, 16, 32), scale.flatten(1), -offset.flatten(1), "int4_offset", 32)


def _q6_k(blocks: Blocks) -> Unpacked:
    """The low four bits of a half block lie in two runs of nibbles, the high two in four runs of bit pairs."""
    low = torch.from_numpy(blocks[..., :128].copy()).unflatten(-1, (2, 1, 64))
    high = torch.from_numpy(blocks[..., 128:192].copy()).unflatten(-1, (2, 1, 32))
    four = torch.cat([low & 15, low >> 4], dim=-2).flatten(-2)
    two = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-2)
    codes = ((four | (two << 4)).to(torch.int16) - 32).to(torch.int8).flatten(1)
    inner = torch.from_numpy(blocks[..., 192:208].copy().view(np.int8)).float()
    scale = _half(blocks, 208).float().unsqueeze(-1) * inner
    return Unpacked(codes, scale.flatten(1), None, "int8", 16)


READERS: dict[str, Callable[[Blocks], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
"""Block types that keep their codes."""


class GgufFile:
    """The weights of a GGUF file by the names of a model of `transformers`.

    Args:
        file: path of the file.
        reader: from the package gguf.
        processor: from `transformers`: turns a tensor of the file into that of the model.
        names: the model's name of each tensor of the file.
    """

    def __init__(self, file: str, reader: Any, processor: Any, names: dict[str, str]) -> None:
        import gguf  # a part of the extra that reads such files

        self.where = file
        self._dequantize = gguf.dequantize
        self._processor = processor
        # The name of a parameter of experts is that of no module's weight, and has no suffix.
        found = {t.name: names.get(t.name) or names.get(t.name.removesuffix(".weight")) for t in reader.tensors}
        known = {name: parameter for name, parameter in found.items() if parameter is not None}
        named = [t for t in reader.tensors if t.name in known]
        self._tensors = {known[t.name]: t for t in named if len(t.shape) <= MATRIX}
        self._stacks = self._placed([t for t in named if len(t.shape) > MATRIX], known)
        self._dequantized: dict[str, str] = {}
        types = dict.fromkeys(t.tensor_type.name for t in named)
        self.summary = "gguf, " + ", ".join(name for name in types if name not in FLOATS)

    @property
    def notes(self) -> list[str]:
        """Tensors whose blocks have no packed form."""
        by_type: dict[str, list[str]] = {}
        for name, kind in self._dequantized.items():
            by_type.setdefault(kind, []).append(name)
        return [
            f"{len(names)} tensors of type {kind} were dequantized, the first is {names[0]}"
            for kind, names in by_type.items()
        ]

    def is_float(self, name: str) -> bool:
        """Whether there is a tensor of this name in floating point."""
        return name in self._tensors and self._tensors[name].tensor_type.name in FLOATS

    def find(self, name: str) -> Tensor | None:
        """The values of a tensor, or None; one in blocks is dequantized, and noted."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if not self.is_float(name):
            self._dequantized[name] = tensor.tensor_type.name
        values = self._dequantize(tensor.data, tensor.tensor_type)
        changed = self._processor.process(values, tensor.name, tensor_key_mapping={}, parsed_parameters={})
        return torch.from_numpy(np.array(changed.weights, dtype=np.float32))

    def packed(self, name: str, kind: str, shape: tuple[int, int]) -> Packed | None:
        """The weight of a module in codes, or None.

        Raises:
            SourceError: it has another shape.
        """
        tensor = self._tensors.get(f"{name}.weight")
        if tensor is None or tensor.tensor_type.name not in READERS:
            return None
        order = self._order(tensor)
        if order is None:
            return None
        self._check(tensor, name, shape)
        rows = shape[0]
        plain = bool((order == torch.arange(rows)).all())
        return _unpacked(tensor, tensor.data, rows).rows(None if plain else order).packed()

    def experts(self, name: str, shape: tuple[int, ...]) -> list[list[Packed | Tensor]] | None:
        """The layers whose weights a parameter [E, N, K] holds: by part of the rows, and by expert.

        Raises:
            SourceError: they have another shape.
        """
        stacks = self._stacks.get(name)
        if stacks is None:
            return None
        count, rows, width = shape[0], shape[1] // len(stacks), shape[2]
        parts: list[list[Packed | Tensor]] = []
        for tensor in stacks:
            self._check(tensor, name, (count, rows, width))
            kind = tensor.tensor_type.name
            if kind in READERS:
                parts.append([_unpacked(tensor, tensor.data[expert], rows).packed() for expert in range(count)])
                continue
            if kind not in FLOATS:
                self._dequantized[name] = kind
            values = self._dequantize(tensor.data, tensor.tensor_type)
            parts.append(list(torch.from_numpy(np.array(values, dtype=np.float32)).reshape(count, rows, width)))
        return parts

    def _placed(self, tensors: list[Any], names: dict[str, str]) -> dict[str, list[Any]]:
        """The tensors of experts by the parameter that they become, in the order of its rows.

        Found by letting the processor place a tensor that holds ones.
        """
        starts: dict[str, list[tuple[int, Any]]] = {}
        for tensor in tensors:
            name, rows = names[tensor.name], int(tensor.shape[1])
            mapping, parsed = {tensor.name.removesuffix(".weight"): name}, {"tensors": dict[str, Tensor]()}
            ones = np.ones((1, rows, 1), dtype=np.float32)
            self._processor.process(ones, tensor.name, tensor_key_mapping=mapping, parsed_parameters=parsed)
            placed = parsed["tensors"].get(name)
            start = 0 if placed is None else int(placed.flatten().nonzero()[0])
            starts.setdefault(name, []).append((start, tensor))
        return {name: [one for _, one in sorted(found, key=lambda pair: pair[0])] for name, found in starts.items()}

    def _check(self, tensor: Any, name: str, shape: tuple[int, ...]) -> None:
        found = [int(size) for size in reversed(tensor.shape)]
        if found != list(shape):
            raise SourceError(
                f"{tensor.name} has the shape {found}, and {name} should have {list(shape)}",
                where=self.where,
                fix="Download it again",
            )

    def unread(self) -> list[str]:
        """Nothing: every tensor that has a name in the model is asked for under it."""
        return []

    def _order(self, tensor: Any) -> Tensor | None:
        """Which row of the file is each row of the model's weight; None where more happens to it than an order.

        Found by letting the processor change a matrix that holds the numbers of its rows.
        """
        if len(tensor.shape) != 2:
            return None
        rows = int(tensor.shape[1])
        numbers = np.arange(rows, dtype=np.float64)
        try:
            changed = self._processor.process(
                numbers[:, None], tensor.name, tensor_key_mapping={}, parsed_parameters={}
            ).weights
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        if changed is None or changed.size != rows or not np.array_equal(np.sort(changed, axis=None), numbers):
            return None
        return torch.from_numpy(changed.reshape(-1).astype(np.int64))


def _unpacked(tensor: Any, data: Any, rows: int) -> Unpacked:
    """What the blocks of a tensor, or of one expert in it, hold."""
    blocks = np.ascontiguousarray(data).reshape(rows, -1, _block_bytes(tensor))
    return READERS[tensor.tensor_type.name](blocks)


def _block_bytes(tensor: Any) -> int:
    import gguf

    return int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])


def open_gguf(file: str, model: torch.nn.Module, config: Any) -> GgufFile:
    """The weights of a file for `model`, a model of `transformers` with this config, which may have no weights."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as translation

    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    processor = translation.TENSOR_PROCESSORS.get(architecture, translation.TensorProcessor)(config=config.to_dict())
    names = translation.get_gguf_hf_weights_map(model, processor)
    return GgufFile(file, reader, processor, names)
