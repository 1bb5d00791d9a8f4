"""The terminal summary and the HTML page."""

import io
import re
from html.parser import HTMLParser

import pytest
from report.made import EVIL, evil_report, llama, llama_report, report, two_linears
from rich.console import Console

from graphwright.report import facts
from graphwright.report.chart import roofline_chart
from graphwright.report.html import render
from graphwright.report.terminal import print_report

SIZE_LIMIT = 1_000_000


class Tags(HTMLParser):
    """Collects tags and attributes; unbalanced markup raises."""

    VOID = {"meta", "link", "br", "input", "path", "rect", "line", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def printed(made, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    print_report(made, console)
    return console.file.getvalue()


def test_the_page_needs_nothing_from_outside():
    page = render(llama_report())
    assert not re.search(r"(src|href|action|xlink:href)\s*=", page)
    assert not re.search(r"https?://|@import|url\(\s*['\"]?(?!#)|fetch\(|XMLHttpRequest", page)
    assert {tag for tag, _ in parsed(page).found}.isdisjoint({"link", "iframe", "img", "object", "embed", "base"})


def test_the_page_says_what_happened():
    made = llama_report()
    page = render(made)
    for row in made.passes:
        assert row["name"] in page
    for op in (*made.ops["before"], *made.ops["after"]):
        assert op in page
    for text in ("the scale is not a constant", "no kernel for sort", "61.3", "18.42", "88.1%", "median of 5 runs"):
        assert text in page
    assert "Estimates, not measurements" in page
    assert len(page) < SIZE_LIMIT


def test_names_are_escaped_in_the_page():
    page = render(evil_report())
    assert EVIL not in page
    assert "<script>alert" not in page
    scripts = [attributes for tag, attributes in parsed(page).found if tag == "script"]
    assert scripts == [{}]


@pytest.mark.parametrize("make", [llama_report, evil_report])
def test_attributes_hold_no_handlers(make):
    page = render(make())
    assert not [key for _, attributes in parsed(page).found for key in attributes if key.startswith("on")]


def test_a_report_with_nothing_in_it_is_shown():
    program = two_linears()
    made = report(program, program, coverage={}, seconds={}, peak_memory_bytes=0)
    made.target = {**made.target, "bandwidth": 0.0, "flops": {}}
    assert "no roof to draw" in render(made)
    assert "TwoLinears" in printed(made, 80)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_says_what_happened(width):
    made = llama_report()
    text = printed(made, width)
    assert max(len(line) for line in text.splitlines()) <= width
    flat = " ".join(text.split())
    before, after = facts.totals(made)
    for fact in (
        "LlamaForCausalLM", "recipe int4", "target cpu (x86_64)", facts.scaled(before, "B"), facts.scaled(after, "B"),
        "smaller", "61.3", "18.42", "no kernel for sort", "the scale is not a constant", "not a measurement",
        "decode after 128", "read by rms_norm", "capture 1.5 s",
    ):  # fmt: skip
        assert fact in flat, fact
    for row in made.passes:
        assert row["name"] in text


def test_markup_in_names_is_printed_as_it_is():
    assert "[bold]x[/]" in printed(named("[bold]x[/]"), 120)


def named(name: str):
    made = report(*llama())
    made.model = {**made.model, "name": name}
    return made


def test_a_path_is_shown_by_its_last_part():
    assert facts.model_name(named("/models/smollm2")) == "smollm2"
    assert facts.model_name(named("org/smollm2")) == "org/smollm2"


def test_labels_of_the_chart_do_not_cover_each_other():
    chart = roofline_chart(llama_report())
    assert chart is not None
    assert len(chart.points) == 6
    spots = [(point.label_x, point.label_y, point.anchor) for point in chart.points]
    assert len(set(spots)) == len(spots)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (538_060_160, "538 MB"), (91_587_968, "91.6 MB"), (999_999, "1 MB")],
)
def test_sizes(value, text):
    assert facts.scaled(value, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.00478, "4.78 ms"), (59.6, "59.6 s"), (125.2, "2 min 5 s"), (3e-6, "3 µs")]
)
def test_durations(seconds, text):
    assert facts.duration(seconds) == text


def exported_report():
    made = report(*(two_linears() for _ in range(2)))
    verified = {"relative_error": 2.5e-6, "tokens_per_second": 41.5, "runtime": "ONNX Runtime 1, CPU", "limit": 0.01}
    made.export = {"format": "onnx", "options": {"opset": 24}, "nodes": 12, "files": {"model.onnx": 2500, EVIL: 1}}
    made.export["verified"] = verified
    made.coverage = {**made.coverage, "left": {"sort_1": f"no kernel {EVIL}"}}
    return made


def test_the_page_shows_an_export_its_files_and_what_running_it_has_shown():
    page = render(exported_report())
    for text in ("Verified by running it", "ONNX Runtime 1, CPU", "2.5e-06", "41.5", "model.onnx", "2.50 kB"):
        assert text.replace("2.50", "2.5") in page, text
    assert "All 1 node that stayed out" in page
    assert EVIL not in page
    made = exported_report()
    made.export["verified"] = None
    assert "export with --verify" in render(made)


def test_the_terminal_shows_an_export():
    console = Console(file=io.StringIO(), width=160)
    print_report(exported_report(), console)
    shown = console.file.getvalue()
    assert "onnx: 2 files" in shown
    assert "opset=24" in shown
    assert "2.5e-06" in shown
