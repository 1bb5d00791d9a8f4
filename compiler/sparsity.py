"""Which weights of a matrix a sparse pattern keeps, and how a matrix of which two in four are kept is stored.

    pattern = Pattern.parse("2:4")
    keep = pattern.keep(scores, ratio=0.5, per_row=True)      # bool [N, K]

Patterns: `unstructured`; `n:m`, n of every m weights along the input are kept (Mishra et al. 2021, arXiv:2104.08378);
`RxC`, blocks of R rows and C columns are kept or removed as a whole.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.errors import PassError


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
    """Values [N, 2, K / 4] and places uint8 [N, K / 4] of a weight [N, K] with at most two non-zeros in every four.

    The place of the first value of a group lies in bits 0 and 1 of its byte and that of the second in bits 2 and 3.

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
    return values, (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)


def expand(values: Tensor, places: Tensor) -> Tensor:
    """The dense weight [N, K] of what `compress` made, in the dtype of the values."""
    dense = values.new_zeros(*places.shape, 4)
    code = places.long()
    dense.scatter_(-1, (code & 3)[..., None], values[:, 0, :, None])
    dense.scatter_add_(-1, (code >> 2)[..., None], values[:, 1, :, None])
    return dense.flatten(1)


BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def to_bitmask(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The non-zeros [n] of a weight [N, K], row by row, and a bit per weight, uint8 [N, ceil(K / 8)], lowest first."""
    kept = weight != 0
    padded = torch.nn.functional.pad(kept, (0, -weight.shape[1] % 8)).unflatten(1, (-1, 8))
    return weight[kept], (padded * BITS).sum(-1, dtype=torch.uint8)


def from_bitmask(values: Tensor, places: Tensor, width: int) -> Tensor:
    """The dense weight [N, `width`] of what `to_bitmask` made."""
    kept = ((places[..., None] & BITS) != 0).flatten(1)[:, :width]
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)
