"""A packed weight, and the modules that stand for linear layers and embeddings whose weight is one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphwright import packing
from graphwright.ops import quantize_dequantize, quantized_embedding, quantized_linear


@dataclass(frozen=True)
class InputRounding:
    """How a layer rounds what it reads.

    Attributes:
        format: a name in `graphwright.ops.quantize_dequantize.LARGEST`.
        scale: [] measured beforehand, or None for one scale per token, or group of a token, at run time.
        group_size: activations that share a scale; 0 for all of a token.
    """

    format: str
    scale: Tensor | None = None
    group_size: int = 0


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] in the layout of `graphwright.packing`.

    Attributes:
        weight: storage of the codes [N, G * group_size].
        scale: [N, G], float16 or float32.
        zero_point: [N, G], codes or float32 offsets as the format says, or None.
        format: a name in `packing.FORMATS`.
        group_size: codes that share a scale, in storage.
        width: K.
        columns: int64 [K]: stored column i is column `columns[i]` of the weight; None where both orders agree.
        rounding: how the layer rounds its input, if it does.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: str
    group_size: int
    width: int
    columns: Tensor | None = None
    rounding: InputRounding | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return self.weight.shape[0], self.width

    def dense(self) -> Tensor:
        """The weight [N, K] that the codes stand for, float32."""
        stored = packing.dequantize(self.weight, self.scale, self.zero_point, self.format, self.group_size)
        stored = stored[:, : self.width]
        if self.columns is None:
            return stored
        return torch.empty_like(stored).index_copy_(1, self.columns, stored)


class _PackedModule(nn.Module):
    """Keeps the parts of a packed weight as buffers, named as a quantizing pass names them."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.format, self.group_size, self.width = packed.format, packed.group_size, packed.width
        self.codes_name = f"weight_{packed.format}"
        self.register_buffer(self.codes_name, packed.weight)
        self.register_buffer("weight_scale", packed.scale)
        self.register_buffer("weight_zero_point", packed.zero_point)
        self.register_buffer("columns", packed.columns)

    @property
    def weight(self) -> Any:
        """The codes; modelling code asks for the device of a weight."""
        return getattr(self, self.codes_name)


class PackedLinear(_PackedModule):
    """A linear layer whose weight is packed."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__(packed)
        self.out_features, self.in_features = packed.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rounding = packed.rounding
        self.register_buffer("input_scale", packed.rounding.scale if packed.rounding else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        if self.rounding is not None:
            x = quantize_dequantize.target(x, self.input_scale, self.rounding.format, self.rounding.group_size)
        packed = (self.weight, self.weight_scale, self.weight_zero_point)
        result: Tensor = quantized_linear.target(x, *packed, self.bias, self.format, self.group_size)
        return result


class PackedEmbedding(_PackedModule):
    """A table of embeddings whose rows are packed; it has no permuted columns."""

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype = dtype

    def forward(self, indices: Tensor) -> Tensor:
        """Rows [*indices.shape, K] of `dtype`."""
        packed = (self.weight, self.weight_scale, self.weight_zero_point)
        shape = (self.format, self.group_size, self.width, self.dtype)
        result: Tensor = quantized_embedding.target(indices, *packed, *shape)
        return result
