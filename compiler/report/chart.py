"""The roofline chart (Williams et al. 2009): rate against arithmetic intensity, both logarithmic.

`roofline_chart(report)` gives lines, points and ticks in the coordinates of an SVG of `WIDTH` by `HEIGHT`.
"""

import math
from dataclasses import dataclass, replace

from graphwright.report import facts
from graphwright.report.data import EstimateRow, Report, Side

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 18, 44
LABEL_HEIGHT, LABEL_WIDTH, LABEL_GAP = 15.0, 108.0, 9.0


@dataclass(frozen=True)
class Tick:
    """A grid line and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Roof:
    """The limit for one dtype: the slope of the bandwidth, then flat."""

    label: str
    path: str
    x: float
    y: float


@dataclass(frozen=True)
class Point:
    """One estimate."""

    side: Side
    label: str
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything to draw."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    roofs: tuple[Roof, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    length: float

    def at(self, value: float) -> float:
        part = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return round(self.start + self.length * part, 1)

    def ticks(self, unit: str) -> tuple[Tick, ...]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return tuple(Tick(self.at(10.0**e), facts.scaled(10.0**e, unit)) for e in range(first, last + 1))


def roofline_chart(report: Report) -> Chart | None:
    """The chart, or None where the target's rates or the program's work are unknown."""
    bandwidth: float = report.target["bandwidth"]
    peaks: dict[str, float] = report.target["flops"]
    rows = [row for row in report.estimates if row["flops"] and row["bytes"] and row["seconds"]]
    if not bandwidth or not peaks or not rows:
        return None
    intensities = [row["flops"] / row["bytes"] for row in rows]
    rates = [row["flops"] / row["seconds"] for row in rows]
    high_x = max(*intensities, max(peaks.values()) / bandwidth) * 12
    low_x = min(*intensities, min(peaks.values()) / bandwidth) / 4
    x = _Axis(low_x, high_x, LEFT, WIDTH - LEFT - RIGHT)
    y = _Axis(min(*rates, bandwidth * low_x) / 2, max(peaks.values()) * 3, HEIGHT - BOTTOM, TOP + BOTTOM - HEIGHT)
    points = [
        _point(row, x.at(i), y.at(r), f"{i:.3g} FLOP/byte, {facts.scaled(r, 'FLOP/s')}")
        for row, i, r in zip(rows, intensities, rates, strict=True)
    ]
    roofs = [_roof(names, peak, bandwidth, x, y) for peak, names in _by_peak(peaks).items()]
    return Chart(x.ticks(""), y.ticks(""), tuple(roofs), tuple(_apart(points)))


def _point(row: EstimateRow, x: float, y: float, text: str) -> Point:
    """A point with its label to the right, or to the left where the chart ends."""
    fits = x + LABEL_WIDTH + LABEL_GAP < WIDTH - RIGHT
    label_x = x + LABEL_GAP if fits else x - LABEL_GAP
    text = f"{row['phase']}, {row['side']}: {text}"
    return Point(row["side"], row["phase"], x, y, label_x, y + LABEL_HEIGHT, "start" if fits else "end", text)


def _by_peak(peaks: dict[str, float]) -> dict[float, str]:
    """Dtypes with the same peak share a roof."""
    names: dict[float, str] = {}
    for dtype, peak in peaks.items():
        names[peak] = f"{names[peak]}, {dtype}" if peak in names else dtype
    return names


def _roof(names: str, peak: float, bandwidth: float, x: _Axis, y: _Axis) -> Roof:
    ridge = peak / bandwidth
    path = f"M{x.at(x.low)},{y.at(bandwidth * x.low)}L{x.at(ridge)},{y.at(peak)}L{x.at(x.high)},{y.at(peak)}"
    return Roof(f"{names} {facts.scaled(peak, 'FLOP/s')}", path, x.at(x.high), y.at(peak) - 6)


def _apart(points: list[Point]) -> list[Point]:
    """The points with labels moved down until none covers another: below a roof there are no lines."""
    placed: list[Point] = []
    for point in sorted(points, key=lambda p: (p.y, p.x)):
        label_y = point.label_y
        while any((abs(label_y - p.label_y) < LABEL_HEIGHT and _overlap(point, p)) for p in placed) or any(
            _covers(point, label_y, p) for p in points
        ):
            label_y += 1
        placed.append(replace(point, label_y=label_y))
    return placed


def _covers(labelled: Point, label_y: float, point: Point) -> bool:
    """Whether the label at `label_y` would lie on the mark of `point`."""
    left = _label_left(labelled)
    return left - 6 < point.x < left + LABEL_WIDTH and label_y - LABEL_HEIGHT - 2 < point.y < label_y + 6


def _label_left(point: Point) -> float:
    return point.label_x - (LABEL_WIDTH if point.anchor == "end" else 0.0)


def _overlap(one: Point, other: Point) -> bool:
    """Whether the labels share a column."""
    return abs(_label_left(one) - _label_left(other)) < LABEL_WIDTH
