"""Key-value caches on SmolLM2: perplexity, bytes per token, decode speed by context, and what long texts do to them.

    python samples/bench/caches.py                                  every layout: perplexity, bytes, decode speed
    python samples/bench/caches.py --only 'static|int8|kivi'        some of them
    python samples/bench/caches.py --long 20000                     StreamingLLM against a plain window, token by token
    python samples/bench/caches.py --budget 0.2                     H2O against windows of the same budget

Perplexity is that of the model in float32 on held-out text, which enters the cache in small chunks, so that every token
reads what the cache made of those before it. Speed is that of decode steps behind a full context, with weights as the
base recipe makes them (int8-dynamic, which TVM lowers where it has kernels for the cache; Inductor elsewhere).
"""

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import graphwright
from graphwright import accuracy, calibration
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.tokenizer import Tokenizer
from graphwright.feeding import logits_in_chunks
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import demo_model, open_model
from graphwright.speed import Stepper
from graphwright.target import Target

CPU = Target.parse("cpu")
PREFILL = 512
"""Tokens of a chunk while a context is filled before decoding is timed."""


def layouts(length: int) -> dict[str, list[Any]]:
    """Passes after `static_cache`, by label; budgets are a fifth of `length`."""
    budget = length // 5
    return {
        "static": [],
        "float16": ["half_cache"],
        "int8": ["quantized_cache"],
        "int4": [{"quantized_cache": {"format": "int4"}}],
        "fp8": [{"quantized_cache": {"format": "fp8_e4m3"}}],
        "kivi 2 bits": ["kivi_cache"],
        "kivi keys 4, values 2 bits": [{"kivi_cache": {"key_bits": 4}}],
        "kivi 4 bits": [{"kivi_cache": {"bits": 4}}],
        "kvquant 3 bits": ["kvquant_cache"],
        "kvquant 2 bits": [{"kvquant_cache": {"bits": 2}}],
        "paged": ["paged_cache"],
        "paged int8": ["quantized_cache", "paged_cache"],
        f"h2o {budget}": [{"h2o_cache": {"budget": budget}}],
        f"scissorhands {budget}": [{"scissorhands_cache": {"budget": budget}}],
        f"sinks and window {budget}": [{"streaming_cache": {"sinks": 4, "window": budget - 4}}],
        f"window {budget}": [{"streaming_cache": {"sinks": 0, "window": budget}}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression that labels must match")
    parser.add_argument("--base", default="int8-dynamic", help="recipe of the weights where speed is measured")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window of held-out text")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=16, help="tokens that enter the cache at a time")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 2048, 8128])
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed behind each context")
    parser.add_argument("--no-speed", action="store_true", help="perplexity and bytes only, nothing is compiled")
    parser.add_argument("--long", type=int, default=0, help="only measure a text of so many tokens")
    parser.add_argument("--kept", type=int, default=1024, help="tokens that caches keep of the long text")
    parser.add_argument("--budget", type=float, default=0.0, help="only compare evicting caches with this share")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16-products", action="store_true", help="faster, where the CPU multiplies bfloat16")
    parser.add_argument("--json", type=Path, help="write the results here, one JSON object a line, as they come")
    parser.add_argument("--worker", nargs=2, metavar=("LABEL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("medium" if arguments.bf16_products else "highest")
    if arguments.worker:
        sys.stdout.write(json.dumps(work(*arguments.worker, arguments)) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for label in labels(arguments):
            rows.append(work(label, folder, arguments) if arguments.no_speed else in_worker(label, folder))
            Console().print(rows[-1])
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    Console().print(table(rows))


def labels(arguments: argparse.Namespace) -> list[str]:
    """What is measured, one process each."""
    if arguments.long:
        return ["long sinks and window", "long window"]
    if arguments.budget:
        budget = int(arguments.budget * arguments.length)
        return [f"budget {name} {budget}" for name in ("h2o", "scissorhands", "window", "sinks and window", "static")]
    return [label for label in layouts(arguments.length) if re.search(arguments.only, label)]


def prepare(folder: Path) -> None:
    """Writes the merged program and the tokenizer."""
    source = open_model(demo_model())
    shutil.copytree(source.tokenizer_directory, folder / "tokenizer")
    options = CompileOptions(verify=False)
    program = rewrite(capture(source.model), Recipe.load({"passes": ["merge_linear"]}), CPU, options)
    (folder / "plain").mkdir()
    program.save(folder / "plain")


def in_worker(label: str, folder: str) -> dict[str, Any]:
    """Measures one layout in a process of its own, so that no layout is timed beside the memory of another."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", label, folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(label: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    tokenizer = Path(folder) / "tokenizer"
    text = Tokenizer(tokenizer).encode(accuracy.built_in_text(held_out=True))
    arguments.plain = Path(folder) / "plain"
    program = Program.load(arguments.plain)
    if label.startswith("long "):
        return long_text(label, program, text, arguments)
    if label.startswith("budget "):
        name, budget = label.removeprefix("budget ").rsplit(" ", 1)
        known = layouts(5 * int(budget))
        found = rewritten(program, known.get(f"{name} {budget}", []), tokenizer)
        return {"cache": label, "perplexity": round(perplexity(found, text, arguments), 3)}
    passes = layouts(arguments.length)[label]
    found = rewritten(program, passes, tokenizer)
    row: dict[str, Any] = {"cache": label, "perplexity": round(perplexity(found, text, arguments), 3)}
    for context in arguments.contexts:
        state = found.contract.allocate({"batch": 1, "capacity": context + 1, "blocks": -(-context // 16) + 1})
        row[f"bytes/token {context}"] = round(sum(tensor.nbytes for tensor in state.values()) / context)
    del found
    return row if arguments.no_speed else {**row, **speeds(program, passes, tokenizer, arguments)}


def rewritten(program: Program, passes: list[Any], tokenizer: Path) -> Program:
    """The program in float32 with a cache of this layout."""
    samples = calibration.from_text(tokenizer, None, 4, 512) if "kvquant_cache" in str(passes) else []
    options = CompileOptions(verify=False, calibration=tuple(samples))
    return rewrite(program, Recipe.load({"passes": ["static_cache", *passes]}), CPU, options)


def perplexity(program: Program, text: list[int], arguments: argparse.Namespace) -> float:
    """Of windows of the text that enter the cache in chunks."""
    loss = 0.0
    windows = accuracy.token_windows(text, arguments.length, arguments.windows)
    ends = [*range(arguments.chunk, arguments.length, arguments.chunk), arguments.length]
    for window in windows:
        logits = logits_in_chunks(program, window[None], None, ends)[0, :-1]
        loss += float(functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
    return math.exp(loss / (windows.numel() - len(windows)))


def speeds(program: Program, passes: list[Any], tokenizer: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode tokens per second behind each context, and who computes them."""
    preset = Recipe.load(arguments.base).to_data()["passes"]
    recipe = {"passes": [*(one for one in preset if "merge_linear" not in str(one)), *passes]}
    samples = calibration.from_text(tokenizer, None, 4, 512) if "kvquant_cache" in str(passes) else []
    compiled = graphwright.compile(program, recipe, verify=False, calibration=tuple(samples))
    row: dict[str, Any] = {"backend": compiled.backend}
    for context in arguments.contexts:
        stepper = Stepper(compiled.executable, compiled.program.contract, 1, context + arguments.steps, 49152)
        for start in range(0, context, PREFILL):
            stepper(start, min(start + PREFILL, context))
        seconds = []
        for place in range(context, context + arguments.steps):
            started = time.perf_counter()
            stepper(place, place + 1)
            seconds.append(time.perf_counter() - started)
        row[f"tokens/s {context}"] = round(1 / statistics.median(seconds), 1)
    return row


def long_text(label: str, program: Program, text: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and time for each twentieth of a long text; the time of a token at a time, of the compiled program."""
    sinks = 4 if "sinks" in label else 0
    window = {"streaming_cache": {"sinks": sinks, "window": arguments.kept - sinks}}
    ids = torch.tensor([text[place % len(text)] for place in range(arguments.long + 1)])
    found = rewrite(
        program, Recipe.load({"passes": ["static_cache", window]}), CPU, CompileOptions(verify=False), consume=True
    )
    held = sum(tensor.nbytes for tensor in found.contract.allocate({"batch": 1}).values())
    losses, part = losses_in_chunks(found, ids, arguments.chunk), max(1, arguments.long // 20)
    cut = range(0, arguments.long, part)
    row: dict[str, Any] = {
        "cache": label,
        "cache MB": round(held / 1e6, 2),
        "perplexity": [round(math.exp(statistics.fmean(losses[at : at + part])), 2) for at in cut],
    }
    if arguments.no_speed:
        return row
    preset = Recipe.load(arguments.base).to_data()["passes"]
    recipe = {"passes": [*(one for one in preset if "merge_linear" not in str(one)), window]}
    compiled = graphwright.compile(Program.load(arguments.plain), recipe, verify=False)
    seconds = seconds_per_token(compiled, ids, arguments.long)
    times = [round(1e3 * statistics.median(seconds[at : at + part]), 2) for at in cut]
    return {**row, "backend": compiled.backend, "ms/token": times}


def losses_in_chunks(program: Program, ids: torch.Tensor, chunk: int) -> list[float]:
    """Of every token but the first, with a cache of a fixed size; no more logits are held than a chunk has."""
    state = program.contract.allocate({"batch": 1})
    losses: list[float] = []
    for start in range(0, len(ids) - 1, chunk):
        end = min(start + chunk, len(ids) - 1)
        tensors = {"input_ids": ids[None, start:end], "positions": torch.arange(start, end)[None]}
        logits = program(**tensors, **state)[0][0].float()
        losses += functional.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none").tolist()
    return losses


def seconds_per_token(compiled: graphwright.Compiled, ids: torch.Tensor, count: int) -> list[float]:
    """Of a text that is read token by token."""
    tensors = compiled.program.contract.allocate({"batch": 1})
    tensors |= {"input_ids": torch.zeros(1, 1, dtype=torch.int64), "positions": torch.zeros(1, 1, dtype=torch.int64)}
    tensors["logit_index"] = torch.zeros(1, 1, dtype=torch.int64)
    seconds = []
    for place in range(count):
        tensors["input_ids"].fill_(int(ids[place]))
        tensors["positions"].fill_(place)
        started = time.perf_counter()
        compiled.executable(tensors)
        seconds.append(time.perf_counter() - started)
    return seconds


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="SmolLM2-135M-Instruct, held-out text, batch 1")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        made.add_column(column, justify="left" if column in ("cache", "backend") else "right")
    for row in rows:
        made.add_row(*(str(row.get(column, "")) for column in columns))
    return made


if __name__ == "__main__":
    main()
