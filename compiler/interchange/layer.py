"""The tensors of one quantized layer, fetched with their dtype and shape checked, and what is refused by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graphwright import packing
from graphwright.errors import SourceError
from graphwright.interchange.packed import Packed


@dataclass(frozen=True)
class Layer:
    """What a checkpoint holds for the module called `name`.

    Attributes:
        name: of the module, `model.layers.0.self_attn.q_proj`.
        kind: `Linear` or `Embedding`.
        shape: [N, K] of its weight.
        find: the tensor of a full name, or None.
        where: the checkpoint, for people.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    find: Callable[[str], Tensor | None]
    where: str

    def get(self, part: str) -> Tensor | None:
        """The tensor `<name>.<part>`, or None."""
        return self.find(f"{self.name}.{part}")

    def require(self, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor `<name>.<part>`, which has this shape and, if any are given, one of these dtypes.

        Raises:
            SourceError: it is missing, or something else.
        """
        found = self.get(part)
        if found is None:
            raise self.wrong(f"The checkpoint holds {self.name} in codes, but no {self.name}.{part}")
        if tuple(found.shape) != shape:
            raise self.wrong(f"{self.name}.{part} has the shape {list(found.shape)} and should have {list(shape)}")
        if dtypes and found.dtype not in dtypes:
            raise self.wrong(f"{self.name}.{part} is {found.dtype}, and {' or '.join(map(str, dtypes))} was expected")
        return found

    def scales(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """Scales as packed weights hold them: float16 stays, everything else becomes float32.

        Raises:
            SourceError: missing, of another shape, or not finite.
        """
        found = self.require(part, shape, torch.float16, torch.bfloat16, torch.float32)
        if not found.isfinite().all():
            raise self.wrong(f"{self.name}.{part} holds values that are NaN or infinite")
        return found if found.dtype == torch.float16 else found.float()

    def wrong(self, problem: str, fix: str = "Download it again, or quantize the model again") -> SourceError:
        """An error about this layer."""
        return SourceError(problem, where=self.where, fix=fix)


class Method(Protocol):
    """How one quantization method stores layers."""

    summary: str
    """What people are told: `gptq, 4 bits in groups of 128`."""

    notes: list[str]
    """What is read in another way than it says, or left out."""

    def packed(self, layer: Layer) -> Packed | None:
        """The layer's weight, or None if the checkpoint holds it in floating point.

        Raises:
            SourceError: its tensors do not go together.
        """
        ...


def storage_group(group_size: int, width: int, bits: int) -> int:
    """The group size in storage for K = `width`; a whole row (0, -1, or too large) is rounded up to whole bytes."""
    unit = packing.FORMATS["int8" if bits > 4 else f"int{bits}"].unit
    return group_size if 0 < group_size < width else -(-width // unit) * unit


def columns_of(groups: Tensor, group_size: int, layer: Layer) -> Tensor | None:
    """The order of columns in which groups are contiguous, from the group [K] of each; None for the order at hand.

    Raises:
        SourceError: groups are not of one size, so that no order makes them contiguous blocks.
    """
    width = layer.shape[1]
    plain = torch.arange(width) // group_size
    if torch.equal(groups.long(), plain):
        return None
    order = groups.long().argsort(stable=True)
    if not torch.equal(groups.long()[order], plain):
        raise layer.wrong(
            f"{layer.name}.g_idx does not put {group_size} columns in every group", "Quantize it in groups of one size"
        )
    return order
