"""The report in the terminal: what a person wants to know in ten seconds."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphwright.report import facts
from graphwright.report.data import LengthRow, PassRow, Report
from graphwright.report.frontier import chosen_text

KIND_STYLE = {"exact": "green", "approximate": "yellow", "structural": "blue"}
MOST_LEFTOVERS = 8


def print_report(report: Report, console: Console) -> None:
    """Prints the summary of `report`."""
    console.print(_title(report))
    console.print()
    console.print(_passes(report))
    console.print(_facts(report))
    left = facts.leftovers(report)
    if left:
        console.print(_left(left))


def _title(report: Report) -> Text:
    title = Text()
    title.append(facts.model_name(report), style="bold")
    title.append(f" ({report.model['family']})", style="dim")
    title.append("  recipe ").append(str(report.recipe["name"]), style="bold")
    title.append("  target ").append(facts.target_name(report), style="bold")
    title.append("  backend ").append(report.backend, style="bold")
    return title


def _passes(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("pass", overflow="fold")
    table.add_column("kind")
    for name in ("sites", "nodes", "error", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.passes:
        style = "" if row["sites"] else "dim"
        table.add_row(
            _pass_name(row),
            Text(row["kind"], style=KIND_STYLE.get(row["kind"], "")),
            str(row["sites"]),
            f"{row['nodes_before']} → {row['nodes_after']}",
            facts.error(row["error"]),
            facts.duration(row["seconds"]),
            style=style,
        )
    return table


def _pass_name(row: PassRow) -> Text:
    name = Text(row["name"])
    if row["options"]:
        name.append(" " + ", ".join(f"{key}={value}" for key, value in row["options"].items()), style="dim")
    return name


def _facts(report: Report) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for note in report.model.get("notes", ()):
        table.add_row("Checkpoint", Text(note, style="yellow"))
    before, after = facts.totals(report)
    size = f"{facts.scaled(before, 'B')} → {facts.scaled(after, 'B')} ({facts.change(before, after)})"
    if report.artifact_bytes:
        size += f", {facts.scaled(report.artifact_bytes, 'B')} on disk"
    table.add_row("Weights", Text(size))
    for row in report.passes:
        if "chosen" in row["notes"]:
            table.add_row("Widths", Text(f"{row['name']}: {chosen_text(row)}"))
    lowered, total = facts.coverage_counts(report)
    nodes = f"{report.nodes['before']} → {report.nodes['after']} nodes"
    by = facts.lowered_by(report)
    table.add_row("Graph", Text(nodes + (f", {lowered} of {total} ops lowered by {by}" if total else "")))
    for label, values in (("Speed", report.speed), ("Accuracy", report.accuracy)):
        if values:
            table.add_row(label, _measured(values))
    if report.lengths:
        table.add_row("Length", Text("; ".join(_length(row) for row in report.lengths)))
    if report.export:
        table.add_row("Export", _export(report.export))
    table.add_row("Estimate", _estimate(report))
    stages = " · ".join(f"{stage} {facts.duration(seconds)}" for stage, seconds in report.seconds.items())
    table.add_row("Compile", Text(f"{stages}; peak memory {facts.scaled(report.peak_memory_bytes, 'B')}"))
    return table


def _measured(values: dict[str, Any]) -> Text:
    """The first measurements at full strength, how they were made dimmed."""
    text = Text()
    for name, value in facts.table(values):
        text.append("; " if text else "").append(f"{name} ", style="dim").append(value)
    return text


def _length(row: LengthRow) -> str:
    original = row["reference_perplexity"]
    beside = f" (original {facts.figure(original)})" if original is not None else ""
    return f"{row['length']} tokens: perplexity {facts.figure(row['perplexity'])}{beside}"


def _export(export: dict[str, Any]) -> Text:
    """What was written, and what running it has shown."""
    sizes = export["files"].values()
    text = Text(f"{export['format']}: {facts.counted(len(sizes), 'file')}, {facts.scaled(sum(sizes), 'B')}")
    options = ", ".join(f"{key}={value}" for key, value in export["options"].items())
    text.append(f" ({options})" if options else "", style="dim")
    verified = export["verified"]
    if verified is None:
        return text.append("; not run, see --verify", style="dim")
    text.append("\n").append_text(_measured({k: v for k, v in verified.items() if k != "limit"}))
    return text


def _estimate(report: Report) -> Text:
    rows = [row for row in report.estimates if row["side"] == "after"]
    text = Text()
    for row in rows:
        rate = facts.per_second(facts.rate(row))
        text.append(f"{row['phase']}: about {rate} tokens/s ({facts.bound(row)} bound)\n")
    bandwidth = facts.scaled(report.target["bandwidth"], "B/s")
    peak = facts.scaled(report.target["flops"].get("float32", 0.0), "FLOP/s")
    return text.append(f"roofline from {bandwidth} of memory and {peak} float32, not a measurement", style="dim")


def _left(left: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), title="Left as it was")
    table.title_justify, table.title_style = "left", "bold"
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for what, why in left[:MOST_LEFTOVERS]:
        table.add_row(Text(what), Text(why))
    if len(left) > MOST_LEFTOVERS:
        table.add_row(Text(f"and {len(left) - MOST_LEFTOVERS} more, in the HTML report"), "")
    return table


__all__ = ["print_report"]
