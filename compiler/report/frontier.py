"""The frontier of mixed precision: the least error of all choices of widths, against mean bits per weight.

`frontier_charts(report)` gives one chart for each pass that mixed widths, in the coordinates of an SVG of `WIDTH` by
`HEIGHT`. The error is the root of the mean over layers of the squared relative error of outputs, on a logarithmic axis.
"""

import math
from dataclasses import dataclass

from graphwright.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick
from graphwright.report.data import PassRow, Report


@dataclass(frozen=True)
class FrontierChart:
    """Everything to draw: the pass, the polyline of the frontier, the point that was chosen and what it is."""

    name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    path: str
    x: float
    y: float
    text: str


def frontier_charts(report: Report) -> list[FrontierChart]:
    """A chart for every pass that notes a frontier of more than one point."""
    return [_chart(row) for row in report.passes if len(row["notes"].get("frontier", ())) > 1]


def chosen_text(row: PassRow) -> str:
    """What a pass that mixed widths chose."""
    bits, loss = row["notes"]["chosen"]
    return f"{bits:.2f} bits per weight, outputs of layers off by {math.sqrt(loss):.2%}"


def _chart(row: PassRow) -> FrontierChart:
    points = [(bits, math.sqrt(max(loss, 1e-12))) for bits, loss in row["notes"]["frontier"]]
    chosen, loss = row["notes"]["chosen"]
    low_x, high_x = math.floor(points[0][0]), math.ceil(points[-1][0])
    low_y, high_y = math.log10(points[-1][1]) - 0.05, math.log10(points[0][1]) + 0.05

    def x(bits: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (bits - low_x) / max(high_x - low_x, 1), 1)

    def y(error: float) -> float:
        part = (math.log10(error) - low_y) / (high_y - low_y)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part, 1)

    decades = range(math.floor(low_y), math.ceil(high_y) + 1)
    errors = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return FrontierChart(
        name=row["name"],
        x_ticks=tuple(Tick(x(bits), str(bits)) for bits in range(low_x, high_x + 1)),
        y_ticks=tuple(Tick(y(e), f"{100 * e:g} %") for e in errors if low_y <= math.log10(e) <= high_y),
        path="M" + "L".join(f"{x(bits)},{y(error)}" for bits, error in points),
        x=x(chosen),
        y=y(math.sqrt(max(loss, 1e-12))),
        text=chosen_text(row),
    )
