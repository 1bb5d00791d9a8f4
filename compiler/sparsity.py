"""Which weights of a matrix a sparse pattern keeps, and how a matrix is stored without its zeros.

    pattern = Pattern.parse("2:4")
    keep = pattern.keep(scores, ratio=0.5, per_row=True)      # bool [N, K]

Patterns: `unstructured`; `n:m`, n of every m weights along the input are kept (Mishra et al. 2021, arXiv:2104.08378);
`RxC`, blocks of R rows and C columns are kept or removed as a whole.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from graphwright.errors import PassError

TENSOR_CORES = "2:4 tensor cores"
"""The layout of 2:4 weights that sparse tensor cores of NVIDIA's GPUs read."""


@dataclass(frozen=True)
class Pattern:
    """A pattern: n of m along the input, or blocks of rows and columns; single weights are blocks of 1 x 1."""

    kept: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @staticmethod
    def parse(text: str) -> "Pattern":
        """From `unstructured`, `2:4` or `16x16`.

        Raises:
            ValueError: the text names no pattern.
        """
        if text == "unstructured":
            return Pattern()
        found = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        if found:
            first, second = int(found[1]), int(found[3])
            if found[2] == ":" and 0 < first < second:
                return Pattern(kept=first, of=second)
            if found[2] == "x" and first > 0 and second > 0:
                return Pattern(rows=first, columns=second)
        raise ValueError(f"{text!r} is no pattern: give unstructured, n:m with 0 < n < m such as 2:4, or RxC as 16x16")

    @property
    def ratio(self) -> float | None:
        """The part that an n:m pattern removes, or None where it is free."""
        return 1 - self.kept / self.of if self.of else None

    @property
    def step(self) -> int:
        """Columns that belong together."""
        return self.of or self.columns

    def check(self, shape: torch.Size) -> None:
        """Refuses a matrix that is not made of whole groups or blocks.

        Raises:
            PassError: with the nearest sizes that divide.
        """
        rows, width = shape
        if width % self.step or rows % self.rows:
            found, wanted = (width, self.step) if width % self.step else (rows, self.rows)
            nearest = next(size for size in range(wanted, 0, -1) if found % size == 0)
            name = f"{self.kept}:{self.of}" if self.of else f"{self.rows}x{self.columns}"
            raise PassError(
                f"The pattern {name} does not divide a weight of {rows} x {width}: {found} is no multiple of {wanted}",
                fix=f"The nearest size that divides is {nearest}; or use unstructured, or name the layer under skip",
            )

    def keep(self, scores: Tensor, ratio: float, *, per_row: bool = False) -> Tensor:
        """The weights that stay, bool [N, K]: those with the highest scores.

        Args:
            scores: float [N, K].
            ratio: part to remove, rounded down to whole weights or blocks; an n:m pattern has its own.
            per_row: whether single weights compete within their row (floor(ratio * K) go in each) or in the matrix.

        Raises:
            PassError: the pattern does not divide the shape.
        """
        self.check(scores.shape)
        if self.of:
            groups = scores.unflatten(1, (-1, self.of))
            return _highest(groups, self.of - self.kept).flatten(1)
        if self.rows == self.columns == 1:
            flat = scores if per_row else scores.reshape(1, -1)
            return _highest(flat, int(ratio * flat.shape[1])).view(scores.shape)
        blocks = scores.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows)).sum((1, 3))
        chosen = _highest(blocks.reshape(1, -1), int(ratio * blocks.numel())).view(blocks.shape)
        return chosen.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


def _highest(scores: Tensor, removed: int) -> Tensor:
    """All but the `removed` lowest scores along the last axis; of equal ones the first go."""
    lowest = scores.argsort(dim=-1, stable=True)[..., :removed]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, lowest, False)


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, 2, K / 4] and places uint8 [N, ceil(K / 8)] of a weight [N, K] with two non-zeros in four at most.

    The places of a group of four are four bits: that of its first value in the lower two. Even groups lie in the low
    half of a byte. So a weight of b bits takes b / 2 + 1 bits.

    Raises:
        PassError: K is no multiple of four, or a group has more than two non-zeros.
    """
    if weight.shape[1] % 4:
        raise PassError(f"Rows of {weight.shape[1]} are not made of groups of four")
    grouped = weight.unflatten(-1, (-1, 4))
    if ((grouped != 0).sum(-1) > 2).any():
        raise PassError("A group of four weights has more than two non-zeros", fix="Prune the weight to 2:4 first")
    # The two largest, in the order of their places; zeros fill up groups that have fewer.
    places = grouped.abs().topk(2, dim=-1).indices.sort(-1).values
    values = grouped.gather(-1, places).movedim(-1, 1).contiguous()
    return values, pack_places(places)


def expand(values: Tensor, places: Tensor) -> Tensor:
    """The dense weight [N, K] of what `compress` made, in the dtype of the values."""
    dense = values.new_zeros(values.shape[0], values.shape[2], 4)
    first, second = unpack_places(places, values.shape[2]).long().unbind(-1)
    dense.scatter_(-1, first[..., None], values[:, 0, :, None])
    dense.scatter_add_(-1, second[..., None], values[:, 1, :, None])
    return dense.flatten(1)


def tensor_core_obstacle(weight: Tensor) -> str:
    """Why a weight [N, K] cannot have the layout of sparse tensor cores, or empty."""
    rows, width = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"its values are {weight.dtype}, and float16 or bfloat16 is needed"
    if rows % 32 or width % 64:
        return f"it has {rows} x {width} values, and multiples of 32 x 64 are needed"
    return ""


def compress_for_tensor_cores(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, K / 2] and metadata int16 [N, K / 16] of a 2:4 weight [N, K], as CUTLASS lays them out.

    A weight of 16 bits takes 9: half its values, and two bits of metadata for each of these.

    Raises:
        PassError: a group of four has more than two non-zeros, or `tensor_core_obstacle` finds something.
    """
    obstacle = tensor_core_obstacle(weight)
    if obstacle:
        raise PassError(f"The weight cannot have the layout {TENSOR_CORES}: {obstacle}")
    if ((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) > 2).any():
        raise PassError("A group of four weights has more than two non-zeros", fix="Prune the weight to 2:4 first")
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return values.contiguous(), metadata.contiguous()


def expand_from_tensor_cores(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense weight [N, K] of what `compress_for_tensor_cores` made."""
    return sparse_semi_structured_to_dense_cutlass(values, metadata)


def pack_places(places: Tensor) -> Tensor:
    """Places [N, G, 2] of values in their groups of four, two groups to a byte."""
    nibbles = (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)
    pairs = functional.pad(nibbles, (0, nibbles.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_places(places: Tensor, groups: int) -> Tensor:
    """The places uint8 [N, `groups`, 2] that `compress` packed."""
    nibbles = torch.stack([places & 15, places >> 4], -1).flatten(1)[:, :groups]
    return torch.stack([nibbles & 3, nibbles >> 2], -1)


BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def to_blocks(values: Tensor, kept: Tensor, rows: int = 1, columns: int = 1) -> tuple[Tensor, Tensor]:
    """The blocks [n, rows * columns] that are kept, row by row, and a bit per block, uint8 [N / rows, bytes].

    Args:
        values: [N, K], weights or their codes.
        kept: bool [N, K], what must be stored; a block of which one element is kept is stored as a whole.
        rows: of a block; they divide N.
        columns: of a block; they divide K. Blocks of 1 x 1 make this a bitmask of single weights.
    """
    wanted = _blocks(kept, rows, columns).any(-1)
    padded = functional.pad(wanted, (0, -wanted.shape[1] % 8)).unflatten(1, (-1, 8))
    return _blocks(values, rows, columns)[wanted], (padded * BITS).sum(-1, dtype=torch.uint8)


def from_blocks(values: Tensor, kept: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """The matrix [N, K] of blocks that `to_blocks` made, with zeros where nothing was stored.

    Args:
        values: elements of the stored blocks, in order; what follows them is not looked at.
        kept: of `blocks_kept`.
        rows: of a block.
        columns: of a block.
    """
    places = kept[..., None].expand(*kept.shape, rows * columns)
    full = values.new_zeros(places.shape).masked_scatter(places, values.flatten())
    return full.unflatten(2, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)


def blocks_kept(places: Tensor, count: int) -> Tensor:
    """Which blocks are stored, bool [N / rows, `count`]."""
    return ((places[..., None] & BITS.to(places.device)) != 0).flatten(1)[:, :count]


def _blocks(values: Tensor, rows: int, columns: int) -> Tensor:
    """[N / rows, K / columns, rows * columns]."""
    return values.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
