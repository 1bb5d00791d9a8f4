"""Perplexity over the length of the text: the compiled program, and the original as far as its context goes.

`length_chart(report)` gives the curves in the coordinates of an SVG of `WIDTH` by `HEIGHT`; both axes are logarithmic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphwright.report import facts
from graphwright.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick
from graphwright.report.data import Report, Side


@dataclass(frozen=True)
class Mark:
    """One measured point and what it says."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """One program's polyline and its points."""

    side: Side
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class LengthChart:
    """Everything to draw."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]


def length_chart(report: Report) -> LengthChart | None:
    """The chart, or None where no lengths were measured."""
    rows = report.lengths
    if not rows:
        return None
    series: dict[Side, list[tuple[int, float]]] = {
        "before": [(r["length"], r["reference_perplexity"]) for r in rows if r["reference_perplexity"] is not None],
        "after": [(r["length"], r["perplexity"]) for r in rows],
    }
    values = [value for points in series.values() for _, value in points]
    lengths = [row["length"] for row in rows]
    low, high = min(values) / 1.05, max(values) * 1.05

    def x(length: float) -> float:
        part = (math.log2(length) - math.log2(lengths[0])) / max(math.log2(lengths[-1] / lengths[0]), 1e-9)
        return round(LEFT + 12 + (WIDTH - LEFT - RIGHT - 24) * part, 1)

    def y(value: float) -> float:
        part = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part, 1)

    def curve(side: Side, points: Sequence[tuple[int, float]]) -> Curve:
        marks = [Mark(x(n), y(v), f"{side}, {n} tokens: perplexity {facts.figure(v)}") for n, v in points]
        return Curve(side, "M" + "L".join(f"{mark.x},{mark.y}" for mark in marks), tuple(marks))

    ticks = [low * (high / low) ** (step / 4) for step in range(5)]
    return LengthChart(
        x_ticks=tuple(Tick(x(length), str(length)) for length in lengths),
        y_ticks=tuple(Tick(y(value), f"{value:.3g}") for value in ticks),
        curves=tuple(curve(side, points) for side, points in series.items() if points),
    )
