"""Mixed precision: which of its options each layer gets, for the least loss within some bytes, or the reverse.

The whole frontier is computed exactly: layers are added one after another, and of all choices so far only those stay
that no other one beats in both bytes and loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphwright.errors import PassError


@dataclass(frozen=True)
class Option:
    """One way to store a layer."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Point:
    """One choice for all layers: the index of each layer's option, total bytes and total loss."""

    bytes: int
    loss: float
    chosen: tuple[int, ...]


_Chain = tuple[int, Any] | None
"""The index of the last layer's option, and the chain of the layers before it."""


def frontier(layers: Sequence[Sequence[Option]]) -> list[Point]:
    """All choices that no other one beats in bytes and loss, smallest first.

    >>> [(p.bytes, p.loss) for p in frontier([[Option(1, 5.0), Option(2, 1.0)], [Option(1, 3.0), Option(4, 3.5)]])]
    [(2, 8.0), (3, 4.0)]
    """
    # Choices are chained to the ones before them, or every point would copy all indices at every layer.
    points: list[tuple[int, float, _Chain]] = [(0, 0.0, None)]
    for options in layers:
        extended = [
            (total + option.bytes, loss + option.loss, (index, chain))
            for total, loss, chain in points
            for index, option in enumerate(options)
        ]
        points = _undominated(extended)
    return [Point(total, loss, _indices(chain)) for total, loss, chain in points]


def within(points: Sequence[Point], budget: int) -> Point:
    """The point of least loss that takes at most `budget` bytes.

    Raises:
        PassError: even the smallest takes more.
    """
    affordable = [point for point in points if point.bytes <= budget]
    if not affordable:
        raise PassError(
            f"The budget is {budget} bytes, and the layers take at least {points[0].bytes}",
            fix="Allow more bits, offer smaller widths, or use larger groups",
        )
    return affordable[-1]


def reaching(points: Sequence[Point], loss: float) -> Point:
    """The smallest point whose loss is at most `loss`.

    Raises:
        PassError: even the best loses more.
    """
    found = next((point for point in points if point.loss <= loss), None)
    if found is None:
        raise PassError(
            f"The budget is a total loss of {loss:.3g}, and the layers lose at least {points[-1].loss:.3g}",
            fix="Allow more error, offer larger widths, or use smaller groups",
        )
    return found


def _undominated(points: list[tuple[int, float, _Chain]]) -> list[tuple[int, float, _Chain]]:
    kept: list[tuple[int, float, _Chain]] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _indices(chain: _Chain) -> tuple[int, ...]:
    found = []
    while chain is not None:
        index, chain = chain
        found.append(index)
    return tuple(reversed(found))
