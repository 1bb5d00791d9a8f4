"""The report as one HTML page that needs nothing else: no network, no fonts, no scripts from elsewhere.

    Path("report.html").write_text(render(report))

Everything that comes from a model (names, texts of nodes) is escaped by the template engine.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from graphwright.report import chart, facts
from graphwright.report.data import PassRow, Picture, Report, Side
from graphwright.report.frontier import frontier_charts
from graphwright.report.lengths import length_chart
from graphwright.report.picture import layout

WORST_LAYERS = 12
COLOURS = {"int4 codes": 0, "int8 codes": 1, "float32": 7, "float16": 5, "bfloat16": 5}
SPARE_COLOURS = (3, 4, 2, 6)


def render(report: Report) -> str:
    """The page of `report`."""
    template = _environment().get_template("page.html.j2")
    return template.render(
        report=report,
        facts=facts,
        model=facts.model_name(report),
        target=facts.target_name(report),
        cards=cards(report),
        passes=[(row, pass_details(row)) for row in report.passes],
        ops=op_rows(report),
        bars=weight_bars(report),
        chart=chart.roofline_chart(report),
        chart_size=(chart.WIDTH, chart.HEIGHT, chart.LEFT, chart.RIGHT, chart.TOP, chart.BOTTOM),
        frontiers=frontier_charts(report),
        lengths=length_chart(report),
        pictures=[(side, report.pictures[side], layout(report.pictures[side])) for side in SIDES],
        heaviest={side: _heaviest(report.pictures[side]) for side in SIDES},
        left=facts.leftovers(report),
    )


SIDES: tuple[Side, Side] = ("before", "after")


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    title: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True)
class Part:
    """One piece of a stacked bar; `share` is in percent of the larger bar."""

    format: str
    bytes: int
    share: float
    colour: int


def cards(report: Report) -> list[Card]:
    """The headline figures: what there is, measured before estimated."""
    before, after = facts.totals(report)
    lowered, total = facts.coverage_counts(report)
    nodes = report.nodes
    found = [
        _scaled("Weights", after, "B", f"from {facts.scaled(before, 'B')}, {facts.change(before, after)}"),
        Card("Graph", str(nodes["after"]), "nodes", f"from {nodes['before']}"),
    ]
    if report.speed and report.speed.get("decode_tokens_per_second"):
        speed = facts.per_second(float(report.speed["decode_tokens_per_second"]))
        found.append(Card("Decode, measured", speed, "tokens/s", str(report.speed.get("how", ""))))
    estimate = next((row for row in report.estimates if row["side"] == "after"), None)
    if estimate:
        rate = facts.per_second(facts.rate(estimate))
        found.append(Card("Estimate", f"≈ {rate}", "tokens/s", f"{estimate['phase']}, roofline"))
    verified = (report.export or {}).get("verified")
    if verified:
        found.append(Card("Export, verified", facts.error(verified["relative_error"]), "error", verified["runtime"]))
    if report.accuracy and report.accuracy.get("perplexity") is not None:
        original = report.accuracy.get("reference_perplexity")
        note = f"original {facts.figure(original)}" if original is not None else ""
        found.append(Card("Perplexity", facts.figure(float(report.accuracy["perplexity"])), "", note))
    if total:
        note = f"{lowered} of {total} ops by {facts.lowered_by(report)}"
        found.append(Card("Lowered", _percent(lowered, total), "%", note))
    value, _, unit = facts.duration(sum(report.seconds.values())).partition(" ")
    memory = facts.scaled(report.peak_memory_bytes, "B")
    return [*found, Card("Compile", value, unit, f"peak memory {memory}")]


def _scaled(title: str, number: float, unit: str, note: str) -> Card:
    value, _, scaled_unit = facts.scaled(number, unit).partition(" ")
    return Card(title, value, scaled_unit, note)


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that only everything is 100."""
    return f"{math.floor(1000 * part / whole) / 10:g}"


def pass_details(row: PassRow) -> list[tuple[str, list[tuple[str, str]]]]:
    """What is shown when a pass is opened: titled lists of label and text."""
    notes = dict(row["notes"])
    errors, measured = notes.pop("layer_errors", {}), notes.pop("layer_errors_of", "")
    for drawn in ("frontier", "chosen"):
        notes.pop(drawn, None)
    sections = []
    if row["options"]:
        sections.append(("Options", [(key, facts.figure(value)) for key, value in row["options"].items()]))
    if notes:
        sections.append(("Notes", facts.table(notes)))
    if errors:
        worst = sorted(errors.items(), key=lambda item: -item[1])
        of = f" of {measured}" if measured else ""
        title = f"Relative error{of} by layer, the {min(WORST_LAYERS, len(worst))} largest of {len(worst)}"
        sections.append((title, [(name, f"{value:.3g}") for name, value in worst[:WORST_LAYERS]]))
    if row["near_misses"]:
        sections.append(("Near misses", [("", miss) for miss in row["near_misses"]]))
    return sections


def op_rows(report: Report) -> list[dict[str, Any]]:
    """One row per op with its two counts, and the length of their bars in percent."""
    before, after = report.ops["before"], report.ops["after"]
    most = max([*before.values(), *after.values()], default=1)
    names = sorted({*before, *after}, key=lambda name: (-max(before.get(name, 0), after.get(name, 0)), name))
    return [
        {
            "name": name,
            "semantic": name in report.semantic_ops,
            "counts": [(side, count, 100 * count / most) for side, count in zip(SIDES, counts, strict=True)],
        }
        for name in names
        for counts in [(before.get(name, 0), after.get(name, 0))]
    ]


def weight_bars(report: Report) -> list[tuple[Side, int, list[Part]]]:
    """Two stacked bars on one scale, with a colour per format that both share."""
    formats = dict.fromkeys(name for side in SIDES for name in report.weight_bytes[side])
    others = [name for name in formats if name not in COLOURS]
    spare = {name: SPARE_COLOURS[index % len(SPARE_COLOURS)] for index, name in enumerate(others)}
    colour = {**spare, **COLOURS}
    longest = max(*facts.totals(report), 1)
    return [
        (side, sum(sizes.values()), [Part(f, b, 100 * b / longest, colour[f]) for f, b in sizes.items()])
        for side, sizes in ((side, report.weight_bytes[side]) for side in SIDES)
    ]


def _heaviest(picture: Picture) -> str:
    """The call that moves most, to be explained first."""
    calls = [node for node in picture["nodes"] if node["kind"] not in ("weight", "input")]
    return max(calls, key=lambda node: node["cost_bytes"])["id"] if calls else ""


def _pretty(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items())


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        scaled=facts.scaled, duration=facts.duration, error=facts.error, pretty=_pretty, bound=facts.bound
    )
    return environment


__all__ = ["render"]
