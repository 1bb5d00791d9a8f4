"""Collecting the report of one compile from the program before, the program after, and its history.

    report = collect(captured, rewritten, recipe=recipe, target=target, backend="inductor",
                     coverage=coverage(rewritten, backend, target).to_json(),
                     seconds={"capture": 3.1, "rewrite": 9.8}, peak_memory_bytes=1 << 30)

Nothing is run and no weight is read, so the captured program's weights may already be gone (meta tensors).
"""

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata as packages
from typing import Any

import torch

from graphwright.cost import program_cost, roofline
from graphwright.op import op_of
from graphwright.program import PassRecord, Program
from graphwright.recipe import Recipe
from graphwright.report.data import EstimateRow, PassRow, Report, Side
from graphwright.report.layer import choose
from graphwright.report.subgraph import draw
from graphwright.report.weights import total_by_format, weight_rows
from graphwright.target import Target
from graphwright.text import op_name

DECODE_AFTER = (128, 512)
PREFILL_TOKENS = 512


def collect(
    captured: Program,
    compiled: Program,
    *,
    recipe: Recipe,
    target: Target,
    backend: str,
    coverage: Mapping[str, Any],
    seconds: Mapping[str, float],
    peak_memory_bytes: int,
) -> Report:
    """The report of a compile that turned `captured` into `compiled`."""
    programs: dict[Side, Program] = {"before": captured, "after": compiled}
    weights = {side: weight_rows(program) for side, program in programs.items()}
    return Report(
        model=_model(captured),
        target=asdict(target),
        backend=backend,
        recipe=recipe.to_data(),
        passes=[_pass_row(record) for record in compiled.history],
        nodes={side: len(program.graph.nodes) for side, program in programs.items()},
        ops={side: op_counts(program) for side, program in programs.items()},
        semantic_ops=sorted({op_name(n.target) for n in compiled.calls() if op_of(n.target)}),
        weights=weights,
        weight_bytes={side: total_by_format(rows) for side, rows in weights.items()},
        unquantized_bytes=sum(r["bytes"] for r in weights["after"] if r["quantizable"] and not r["shares"]),
        cost={side: _symbolic(program) for side, program in programs.items()},
        estimates=[row for side, program in programs.items() for row in _estimates(side, program, target)],
        coverage=dict(coverage),
        pictures={side: draw(program, choose(program), _prefill(program)) for side, program in programs.items()},
        seconds=dict(seconds),
        peak_memory_bytes=peak_memory_bytes,
        versions=_versions(),
    ).plain()


def op_counts(program: Program) -> dict[str, int]:
    """How often each op is called, the most frequent first."""
    counts = Counter(op_name(node.target) for node in program.calls())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _model(program: Program) -> dict[str, Any]:
    known = program.metadata
    return {
        "name": known.name,
        "family": known.family,
        "causal": known.causal,
        "vocab_size": known.vocab_size,
        "context_length": known.context_length,
        "parameter_bytes": known.parameter_bytes,
        "notes": list(known.notes),
    }


def _pass_row(record: PassRecord) -> PassRow:
    notes = {key: value for key, value in record.notes.items() if key != "near_misses"}
    return PassRow(
        name=record.name,
        kind=record.kind,
        options=dict(record.options),
        sites=record.sites,
        seconds=record.seconds,
        error=record.error,
        nodes_before=record.nodes_before,
        nodes_after=record.nodes_after,
        notes=notes,
        near_misses=[str(miss) for miss in record.notes.get("near_misses", [])],
    )


def _symbolic(program: Program) -> dict[str, str]:
    cost = program_cost(program)
    return {"flops": str(cost.flops), "bytes": str(cost.bytes)}


def _estimates(side: Side, program: Program, target: Target) -> list[EstimateRow]:
    if not program.metadata.causal:
        return [_estimate(side, program, target, "one call", (PREFILL_TOKENS, 0))]
    longest = _longest(program)
    phases = {f"decode after {held}": (1, held) for held in (min(h, longest - 1) for h in DECODE_AFTER)}
    prompt = min(PREFILL_TOKENS, longest)
    phases[f"prefill {prompt}"] = (prompt, 0)
    return [_estimate(side, program, target, phase, tokens) for phase, tokens in phases.items()]


def _estimate(side: Side, program: Program, target: Target, phase: str, tokens: tuple[int, int]) -> EstimateRow:
    new, held = tokens
    sizes = sizes_for(program, new, held)
    found = roofline(program, target, sizes)
    recomputes = held and not _cached(program)
    return EstimateRow(
        phase=phase,
        side=side,
        tokens=new,
        sizes=sizes,
        flops=found.flops,
        bytes=found.bytes,
        seconds=found.seconds,
        memory_bound_share=found.memory_bound_share,
        note=f"without a cache, all {held + new} tokens are computed again" if recomputes else "",
    )


def sizes_for(program: Program, new: int, held: int) -> dict[str, int]:
    """Sizes of a call with one sequence of `new` tokens after `held`; without a cache the held ones run again."""
    total = new + held
    sequence = new if _cached(program) else total
    wanted = {"batch": 1, "sequence": sequence, "keys": total, "capacity": total + 1, "logits": 1}
    return program.contract.sizes({**wanted, "past": held, "total": total})


def _cached(program: Program) -> bool:
    """Whether keys and values of earlier tokens are kept, in place or handed in and out."""
    return bool(program.contract.state) or any(dim.name == "past" for dim in program.contract.dims)


def _prefill(program: Program) -> dict[str, int]:
    return sizes_for(program, min(PREFILL_TOKENS, _longest(program)), 0)


def _longest(program: Program) -> int:
    limits = [dim.max for dim in program.contract.dims if dim.name in ("sequence", "keys")]
    return max(2, min(limits, default=PREFILL_TOKENS + max(DECODE_AFTER)))


def _versions() -> dict[str, str]:
    try:
        own = packages.version("graphwright")
    except packages.PackageNotFoundError:
        own = "unknown"
    return {
        "graphwright": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


__all__ = ["Report", "collect", "op_counts", "sizes_for"]
