"""What fewer key-value heads and fewer visible keys cost and save: SmolLM2, held-out English text.

    python samples/bench/attention.py heads --samples 32
    python samples/bench/attention.py forms --length 2048
    python samples/bench/attention.py kernels

`heads` converts 3 key-value heads to 1 with every method. `forms` gives perplexity over long texts with windows, sinks
and blocks; position shift is the StreamingLLM one. `kernels` times TVM's attention alone, whose work follows what is
seen: one prompt, and one token after it, with the share of key blocks that are not skipped.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphwright import accuracy, calibration
from graphwright.backends.tvm import BACKEND
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.contract import Contract, InputSpec
from graphwright.engine.tokenizer import Tokenizer
from graphwright.feeding import logits_of
from graphwright.ops import attention
from graphwright.ops.attention import visible_keys
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import demo_model, open_model
from graphwright.target import Target

CPU = Target.parse("cpu")
HEADS: dict[str, list[Any]] = {
    "3 heads, as trained": [],
    **{f"1 head, {name}": [{name: {"groups": 1}}] for name in ("gqa_mean", "gqa_grouped", "gqa_aligned", "gqa_lstsq")},
}
FORMS: dict[str, list[Any]] = {
    "all keys": [],
    "window 256": [{"sliding_window": {"window": 256}}],
    "4 sinks + window 252": [{"attention_sinks": {"window": 252, "sinks": 4}}],
    "4 sinks + window 252, shifted": [{"attention_sinks": {"window": 252, "sinks": 4, "shift": True}}],
    "blocks of 64: 3 local, 1 global": [{"block_sparse": {"block": 64, "local": 3}}],
    "window 1024": [{"sliding_window": {"window": 1024}}],
    "4 sinks + window 1020": [{"attention_sinks": {"window": 1020, "sinks": 4}}],
    "blocks of 64: 15 local, 1 global": [{"block_sparse": {"block": 64, "local": 15}}],
}
KERNELS: dict[str, dict[str, int]] = {
    "all keys": {},
    "window 256": {"window": 256},
    "4 sinks + window 252": {"window": 252, "anchors": 4},
    "blocks of 64: 3 local, 1 global": {"window": 192, "anchors": 64, "block": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("heads", "forms", "kernels"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    parser.add_argument("--length", type=int, default=256, help="tokens per evaluation window")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16-products", action="store_true", help="faster, where the CPU multiplies bfloat16")
    parser.add_argument("--json", type=Path, help="append results here, one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("medium" if arguments.bf16_products else "highest")
    rows = kernels(arguments) if arguments.what == "kernels" else measured(arguments)
    table = Table(
        title=f"{arguments.what}: SmolLM2-135M-Instruct" if arguments.what != "kernels" else "attention alone"
    )
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rewrites and scores every method."""
    source = open_model(demo_model())
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source.tokenizer_directory, Path(folder) / "tokenizer")
        program, tokenizer = capture(source.model), Path(folder) / "tokenizer"
        del source
        program = rewrite(program, Recipe.load("none"), CPU, CompileOptions(verify=False))
        text = Tokenizer(tokenizer).encode(accuracy.built_in_text(held_out=True))
        windows = accuracy.token_windows(text, arguments.length, arguments.windows)
        samples = calibration.from_text(tokenizer, None, arguments.samples, 512)
    methods = HEADS if arguments.what == "heads" else FORMS
    rows = []
    for label, passes in methods.items():
        rows.append(measure(label, passes, program, windows, samples))
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def measure(label: str, passes: list[Any], program: Program, windows: torch.Tensor, samples: list) -> dict[str, Any]:
    """One method's perplexity, the bytes of a cached token, and what the pass took."""
    if any(name in str(passes) for name in ("sliding", "sinks", "sparse")):
        samples = samples[:2]  # only the error of each layer is measured on them
    began = time.perf_counter()
    options = CompileOptions(verify=False, calibration=tuple(samples))
    changed = rewrite(program.clone(), Recipe.load({"passes": passes}), CPU, options)
    seconds = time.perf_counter() - began
    found = accuracy.measure(lambda ids: logits_of(changed, ids), windows)
    errors = [e for record in changed.history for e in record.notes.get("layer_errors", {}).values()]
    nodes = list(changed.calls(attention.target))
    kept = sum(int(n.args[i].meta["val"].shape[1] * n.args[i].meta["val"].shape[3]) * 4 for n in nodes for i in (1, 2))
    return {
        "method": label,
        "perplexity": found.perplexity,
        "layer error": sum(errors) / len(errors) if errors else 0.0,
        "weights MB": sum(tensor.nbytes for tensor in changed.weights().values()) / 1e6,
        "cache bytes/token": kept,
        "seconds": seconds,
    }


def kernels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times attention of 9 heads that share 3, 64 channels, over texts of several lengths, interleaved."""
    rows = []
    for length in (1024, 4096):
        runs = {label: _attention(limits, length) for label, limits in KERNELS.items()}
        taken: dict[tuple[str, int], list[float]] = {}
        for _ in range(arguments.rounds):
            for label, (run, _) in runs.items():
                for queries in (length, 1):
                    taken.setdefault((label, queries), []).append(run(queries))
        for label, (_, share) in runs.items():
            prompt, token = (1e3 * statistics.median(taken[label, queries]) for queries in (length, 1))
            rows.append(
                {"method": label, "keys": length, "prompt ms": prompt, "token ms": token,
                 "blocks of a prompt %": 100 * share(length), "blocks of a token %": 100 * share(1)}
            )  # fmt: skip
    return rows


def _attention(limits: dict[str, int], length: int) -> tuple[Any, Any]:
    """A compiled attention, timed for the last queries of a text, and the share of key blocks that it computes."""

    class Alone(torch.nn.Module):
        def forward(self, query, key, value, query_at, key_at):
            options = {"scale": 0.125, "causal": True, **limits}
            return (attention(query, key, value, query_at, key_at, None, None, None, **options),)

    key, value = torch.randn(1, 3, length, 64), torch.randn(1, 3, length, 64)
    key_at = torch.arange(length)[None]
    compiled = {}
    for queries in (length, 1):
        program, directory = _program(Alone(), queries, length), Path(tempfile.mkdtemp())
        compiled[queries] = BACKEND.compile(
            BACKEND.prepare(program, CPU), CPU, directory, lambda _text, _fraction: None
        )

    def run(queries: int) -> float:
        at = key_at[:, length - queries :].contiguous()
        inputs = {"query": torch.randn(1, 9, queries, 64), "key": key, "value": value, "query_at": at, "key_at": key_at}
        compiled[queries](inputs)
        began = time.perf_counter()
        compiled[queries](inputs)
        return time.perf_counter() - began

    def share(queries: int) -> float:
        at = key_at[:, length - queries :]
        options = {"window": 0, "chunk": 0, "prefix": 0, **limits}
        seen = visible_keys(at, key_at, causal=True, **options)[0]
        rows = (
            torch.nn.functional.pad(seen, (0, 0, 0, -queries % 21)).unflatten(0, (-1, 21))
            if queries > 1
            else seen[None]
        )
        return float(rows.any(1).unflatten(1, (-1, 32 if queries > 1 else 16)).any(-1).float().mean())

    return run, share


def _program(module: torch.nn.Module, queries: int, keys: int) -> Program:
    shapes = {"query": (1, 9, queries, 64), "key": (1, 3, keys, 64), "value": (1, 3, keys, 64)}
    inputs = [InputSpec(name, torch.float32, shape) for name, shape in shapes.items()]
    inputs += [InputSpec(name, torch.int64, (1, n)) for name, n in (("query_at", queries), ("key_at", keys))]
    return Program(torch.fx.symbolic_trace(module), Contract(tuple(inputs), ("out",)), shaped=False)


if __name__ == "__main__":
    main()
