"""Experts of a mixture whose weights are in codes: their layers stacked, and the module that multiplies with them."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphwright import packing
from graphwright.expert_loops import StackedExperts, stacked_experts
from graphwright.interchange.packed import Packed
from graphwright.ops import quantized_experts


class NotStackableError(Exception):
    """Why the codes of experts do not go into one tensor; told as a note."""


@dataclass(frozen=True)
class PackedStack:
    """Weights [E, N, K] in the layout of `graphwright.packing`.

    Attributes:
        weight: storage of the codes [E, N, G * group_size].
        scale: [E, N, G].
        zero_point: [E, N, G], codes or float32 offsets as the format says, or None.
        format: a name in `packing.FORMATS`.
        group_size: codes that share a scale, in storage.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: str
    group_size: int


def stacked(parts: Sequence[Sequence[Packed]]) -> PackedStack:
    """The layers of all experts in one tensor.

    Args:
        parts: for each part of the rows, such as gate and up, the layers by expert.

    Raises:
        NotStackableError: they are stored in several ways, or their columns in another order.
    """
    layers = [layer for part in parts for layer in part]
    kinds = dict.fromkeys(f"{one.format} in groups of {one.group_size}" for one in layers)
    if len(kinds) > 1:
        raise NotStackableError(f"they are stored in {' and in '.join(kinds)}")
    if any(one.columns is not None for one in layers):
        raise NotStackableError("the columns of each are in an order of its own")
    symmetric = all(one.zero_point is None for one in layers)

    def joined(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(one) for one in zip(*tensors, strict=True)])

    return PackedStack(
        joined([[one.weight for one in part] for part in parts]),
        joined([[_wide(one.scale, layers) for one in part] for part in parts]),
        None if symmetric else joined([[_zero_points(one) for one in part] for part in parts]),
        layers[0].format,
        layers[0].group_size,
    )


def _wide(scale: Tensor, layers: Sequence[Packed]) -> Tensor:
    """Float32 if any layer's scales are."""
    return scale if all(one.scale.dtype == scale.dtype for one in layers) else scale.float()


def _zero_points(layer: Packed) -> Tensor:
    """The zero points [N, G], also of a layer that needs none."""
    if layer.zero_point is not None:
        return layer.zero_point
    kind = packing.FORMATS[layer.format]
    return torch.full(layer.scale.shape, kind.zero, dtype=torch.float32 if kind.offset else kind.storage)


class PackedExperts(nn.Module):
    """The experts of a layer, whose two stacks are packed.

    Args:
        up: gate and up, or up alone.
        down: the other one.
        meaning: what the module that it replaces computes.
        module: that module.
    """

    def __init__(self, up: PackedStack, down: PackedStack, meaning: StackedExperts, module: nn.Module) -> None:
        super().__init__()
        self.meaning, self.format = meaning, up.format
        self.up_group_size, self.down_group_size = up.group_size, down.group_size
        self.signature = inspect.signature(module.forward)
        # Named as a quantizing pass names them.
        for name, stack in ((meaning.up, up), (meaning.down, down)):
            self.register_buffer(f"{name}_{stack.format}", stack.weight)
            self.register_buffer(f"{name}_scale", stack.scale)
            self.register_buffer(f"{name}_zero_point", stack.zero_point)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [T, K], their choices [T, J] and shares [T, J], as the replaced module takes them, to [T, N]."""
        given = list(self.signature.bind(*args, **kwargs).arguments.values())
        x, indices, weights = (given[place] for place in self.meaning.order)
        up, down = (
            [getattr(self, f"{name}_{part}") for part in (self.format, "scale", "zero_point")] + [None]
            for name in (self.meaning.up, self.meaning.down)
        )
        sizes = (self.format, self.up_group_size, self.down_group_size)
        middle = (self.meaning.activation, self.meaning.gated, self.meaning.alpha, self.meaning.limit)
        result: Tensor = quantized_experts.target(x, weights, indices, *up, *down, *sizes, *middle)
        return result


def packed_experts(module: nn.Module, stacks: dict[str, Sequence[Sequence[Packed]]]) -> PackedExperts:
    """What takes the place of a module of experts.

    Args:
        module: holds two parameters with the weights of all experts; they may lie on the meta device.
        stacks: the layers of each of them, as `stacked` takes them.

    Raises:
        NotStackableError: the op `quantized_experts` does not compute what the module does with such codes.
    """
    meaning = stacked_experts(module)
    if meaning is None:
        raise NotStackableError(f"a {type(module).__name__} computes something else than two products per expert")
    up, down = (stacked(stacks[name]) for name in (meaning.up, meaning.down))
    if up.format != down.format:
        raise NotStackableError(f"their first product is in {up.format} and the second in {down.format}")
    return PackedExperts(up, down, meaning, module)
