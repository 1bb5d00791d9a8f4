"""What every face of the report says in the same words: sizes, ratios, and what was left as it was and why."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from graphwright.report.data import EstimateRow, Report

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

UNITS = ("", "k", "M", "G", "T", "P")

LABELS = {
    "decode_tokens_per_second": "Decode, tokens/s",
    "prefill_tokens_per_second": "Prefill, tokens/s",
    "how": "How measured",
    "perplexity": "Perplexity",
    "reference_perplexity": "Perplexity of the original",
    "mean_kl": "Mean KL to the original, nats/token",
    "greedy_agreement": "Same most likely token",
    "tokens": "Tokens scored",
    "text": "Text",
    "batch": "Batch",
    "prompt_tokens": "Prompt tokens",
    "new_tokens": "New tokens",
    "threads": "Threads",
    "relative_error": "Relative error against the program",
    "tokens_per_second": "Decode, tokens/s",
    "runtime": "Run on",
    "limit": "Error that rounding explains",
}


def scaled(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: `538 MB`, `12.3 GFLOP`."""
    step = 0
    while abs(value) >= 999.5 and step < len(UNITS) - 1:
        value, step = value / 1000, step + 1
    digits = f"{value:.0f}" if value >= 99.95 or (step == 0 and value == int(value)) else f"{value:.3g}"
    return f"{digits} {UNITS[step]}{unit}".strip()


def duration(seconds: float) -> str:
    """`4.78 ms`, `31.0 s`, `2 min 5 s`."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs" if seconds else "0 s"


def figure(value: Any) -> str:
    """A value of the speed or accuracy tables as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: DASH}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(figure(item) for item in value)
    return str(value)


def model_name(report: Report) -> str:
    """The model's name; of a path only its last part."""
    name = str(report.model["name"])
    return PurePath(name).name if PurePath(name).is_absolute() else name


def target_name(report: Report) -> str:
    """`cpu (x86_64)`; the architecture is left out where the name has it."""
    name, arch = report.target["name"], report.target["arch"]
    return name if arch in name else f"{name} ({arch})"


def totals(report: Report) -> tuple[int, int]:
    """Bytes of all weights before and after."""
    return sum(report.weight_bytes["before"].values()), sum(report.weight_bytes["after"].values())


def change(before: float, after: float) -> str:
    """How many times smaller or larger, or `unchanged`."""
    if not before or not after or abs(before - after) < 0.005 * before:
        return "unchanged" if before == after or (before and after) else ""
    return f"{before / after:.1f}{TIMES} smaller" if before > after else f"{after / before:.1f}{TIMES} larger"


def per_second(value: float) -> str:
    """Tokens per second as a plain number: `61.3`, `1090`."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def error(value: float | None) -> str:
    """A relative error; a dash where none was measured."""
    return DASH if value is None else f"{value:.1e}" if value else "0"


def counted(number: int, noun: str) -> str:
    """`1 weight`, `61 weights`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def rate(row: EstimateRow) -> float:
    """Tokens per second by the estimate."""
    return row["tokens"] / row["seconds"] if row["seconds"] else 0.0


def bound(row: EstimateRow) -> str:
    """What limits most of the time."""
    return "memory" if row["memory_bound_share"] >= 0.5 else "compute"


def table(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Label and text of every measured value; the share of agreement in percent."""
    rows = []
    for key, value in (values or {}).items():
        if isinstance(value, Mapping):
            rows += [(f"{_label(key)} · {label}", text) for label, text in table(value)]
        elif key == "greedy_agreement" and isinstance(value, float):
            rows.append((_label(key), f"{value:.1%}"))
        elif value is not None:
            rows.append((_label(key), figure(value)))
    return rows


def _label(key: str) -> str:
    return LABELS.get(key, key.replace("_", " ").capitalize())


def export_table(report: Report) -> list[tuple[str, str]]:
    """Label and text of everything that is known of an export but its files and its verification."""
    known = report.export or {}
    hidden = ("format", "files", "verified")
    return table({"format": known.get("format"), **{k: v for k, v in known.items() if k not in hidden}})


def coverage_counts(report: Report) -> tuple[int, int]:
    """(ops that the backend lowers itself, all ops)."""
    lowered = sum(report.coverage.get("lowered", {}).values())
    return lowered, lowered + sum(report.coverage.get("fallbacks", {}).values())


def lowered_by(report: Report) -> str:
    """The backend, and what built its code where it has several ways."""
    builder = report.coverage.get("builder")
    return f"{report.backend} ({builder})" if builder else report.backend


def leftovers(report: Report) -> list[tuple[str, str]]:
    """(what, why) of everything that was not rewritten, not quantized or not lowered."""
    left = [(f"backend {name} not used", why) for name, why in report.coverage.get("passed_over", {}).items()]
    for name, count in sorted(report.coverage.get("fallbacks", {}).items(), key=lambda item: -item[1]):
        reason = report.coverage.get("reasons", {}).get(name, "") or "the backend gives no reason"
        left.append((f"{count} {TIMES} {name} not lowered", reason))
    left += [(f"{row['name']} did not match", miss) for row in report.passes for miss in row["near_misses"]]
    return left + _unquantized(report)


def _unquantized(report: Report) -> list[tuple[str, str]]:
    """Floating-point weights by their reader, where the recipe quantized others."""
    rows = report.weights["after"]
    if not any(row["format"].endswith("codes") for row in rows):
        return []
    groups: dict[str, list[int]] = {}
    for row in rows:
        if row["quantizable"] and not row["shares"]:
            groups.setdefault(", ".join(row["readers"]) or "nothing", []).append(row["bytes"])
    return [
        (f"{scaled(sum(sizes), 'B')} in {counted(len(sizes), 'weight')} unquantized", f"read by {readers}")
        for readers, sizes in sorted(groups.items(), key=lambda item: -sum(item[1]))
    ]
