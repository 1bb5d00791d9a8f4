"""What each quantization method costs in accuracy: SmolLM2, held-out English text, one process per method.

    python samples/bench/accuracy.py --only 'int4' --samples 16 --length 512
    python samples/bench/accuracy.py --only '^fp32' 'g64$' 'sparse' --json rows.jsonl

Weights of this model lie on a 4-bit grid of blocks of 32, so groups of 64, 128 and whole rows are measured. Bytes are
those of all weights; head and embedding have 8 bits in every quantized program. Seconds are those of one processor, so
that other work on the machine counts little, and peak memory is that of the process that rewrites. Layer error is the
mean over linear layers of the relative error of their outputs, see `layer_errors`, on two of the calibration windows,
for methods that are compared so; `at most simplest` says on how many layers it is at most that of the simplest method
in the same place: `rtn`, `magnitude` or `svd`. The methods under `outliers` start from a model whose norms were made to
amplify a few channels by 64, with the layers behind them rescaled to match: the same function. Programs are measured as
captured, but for the merged linear layers; those of `structured` are merged after the cut. Several expressions behind
`--only` are done one after another. Rows that `--json FILE` holds already, with the same numbers of samples and
windows, are not measured again, so that an interrupted table goes on; `--table FILE` prints them in Markdown.
"""

import argparse
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphwright import accuracy, calibration, structure
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.tokenizer import Tokenizer
from graphwright.feeding import logits_of
from graphwright.folding import fold_scale, scale_sites
from graphwright.ops import rms_norm
from graphwright.pass_ import Context
from graphwright.passes.quantize.awq import Awq
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.rewrite import Editor
from graphwright.sources import demo_model, open_model
from graphwright.target import Target

sys.path.append(str(Path(__file__).parent))
from layer_errors import layer_errors

CPU = Target.parse("cpu")
GROUPS = {"g64": 64, "g128": 128, "row": 0}
AMPLIFIED, FACTOR = (7, 100, 333), 64.0
COMPARED = 2
"""Calibration windows on which layers are compared."""

SIMPLEST = {r"\b(gptq|awq|hqq)\b": "rtn", r"\b(wanda|sparsegpt)$": "magnitude", r"\b(asvd|svd_llm)$": "svd"}
"""Methods by expression, and the simplest one in their place."""

ALIKE = re.compile(r"^(rtn|gptq|awq|hqq|spqr) int[234]|^sparse .*(magnitude|wanda|sparsegpt)$|(svd|asvd|svd_llm)$")
"""Methods whose layers are compared."""

W8 = {"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}
G8 = {"gptq": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}
DYNAMIC, STATIC = {"activations": {}}, {"activations": {"static": True}}
WIDEST = {"activations": {"static": True, "dynamic_above": 20}}
"""Static, but for inputs whose largest token is more than 20 times a median one."""


def methods() -> dict[str, list[Any]]:
    """The passes of every method by its label."""
    return {"fp32": []} | weight_only() | with_activations() | smaller()


def weight_only() -> dict[str, list[Any]]:
    """Weights at every width and group size; smaller groups where SpQR is compared at equal bytes."""
    found: dict[str, list[Any]] = {}
    for bits in (2, 3, 4, 8):
        for label, group in GROUPS.items():
            for name in ("rtn", "gptq", "awq", "hqq"):
                if bits < 8 or name in ("rtn", "gptq"):
                    found[f"{name} int{bits} {label}"] = [{name: {"bits": bits, "group_size": group}}]
    for group in (16, 32):
        found[f"gptq int3 g{group}"] = [{"gptq": {"bits": 3, "group_size": group}}]
    for bits in (2, 3, 4):
        found[f"spqr int{bits}"] = [{"spqr": {"bits": bits}}]
    found["spqr int3, bytes of gptq int3 g32"] = [{"spqr": {"bits": 3, "threshold": 1.0}}]
    return found | {"nf4 g64": ["nf4"], "mxfp4 g32": ["mxfp4"], "fp8 row": ["fp8"]}


def with_activations() -> dict[str, list[Any]]:
    """Weights and activations, and the model with planted outliers."""
    grouped = {"rtn": {"bits": 8, "group_size": 64, "symmetric": True}}
    found: dict[str, list[Any]] = {
        "w8a8 dynamic": [W8, DYNAMIC],
        "w8a8 static": [W8, STATIC],
        "w8a8 static minmax": [W8, {"activations": {"static": True, "observer": "minmax"}}],
        "w8a8 static, widest dynamic": [W8, WIDEST],
        "zeroquant w8a8": [grouped, DYNAMIC],
        "smoothquant w8a8 dynamic": ["smoothquant", W8, DYNAMIC],
        "smoothquant w8a8 static": ["smoothquant", W8, STATIC],
        "smoothquant w8a8 static minmax": ["smoothquant", W8, {"activations": {"static": True, "observer": "minmax"}}],
        "smoothquant + gptq w8a8 dynamic": ["smoothquant", G8, DYNAMIC],
        "smoothquant + gptq w8a8 static": ["smoothquant", G8, STATIC],
        "fp8 weights and activations": ["fp8", {"activations": {"format": "fp8_e4m3"}}],
        "llm_int8": ["llm_int8"],
    }
    for label in [name for name in found if not re.search("fp8|zeroquant|minmax|widest|gptq", name)]:
        found[f"outliers: {label}"] = found[label]
    for bits in (8, 4):
        act = {"activations": {"format": f"int{bits}"}}
        found[f"rtn w4a{bits}"] = [{"rtn": {}}, act]
        found[f"gptq w4a{bits}"] = [{"gptq": {}}, act]
        found[f"quarot + gptq w4a{bits}"] = ["quarot", {"gptq": {}}, act]
    grouped_codes = {"activations": {"format": "int4", "group_size": 64}}
    found["rtn w4a4 g64"] = [{"rtn": {}}, grouped_codes]
    found["quarot + gptq w4a4 g64"] = ["quarot", {"gptq": {}}, grouped_codes]
    return found


def smaller() -> dict[str, list[Any]]:
    """Sparse, low-rank and cut programs."""
    found: dict[str, list[Any]] = {}
    for pattern in ("unstructured", "2:4"):
        for name in ("magnitude", "wanda", "sparsegpt"):
            found[f"sparse {pattern} {name}"] = [{name: {"pattern": pattern}}]
        joint = {"sparse_gptq": {"pattern": pattern}}
        found[f"sparse {pattern} wanda + rtn int4"] = [{"wanda": {"pattern": pattern}}, "rtn"]
        found[f"sparse {pattern} wanda + gptq int4"] = [{"wanda": {"pattern": pattern}}, "gptq"]
        found[f"sparse {pattern} sparsegpt with gptq int4"] = [joint]
    for removed in (20, 40):
        for name in ("svd", "asvd", "svd_llm"):
            found[f"low rank {removed} % {name}"] = [{name: {"ratio": removed / 100}}]
        whole = {"ratio": removed / 100, "allocation": "global"}
        found[f"low rank {removed} % svd_llm, ranks per layer"] = [{"svd_llm": whole}]
    for removed in (10, 20, 30):
        options = {"ratio": removed / 100}
        for score in ("magnitude", "wanda", "taylor"):
            found[f"structured channels {removed} % {score}"] = [{"prune_channels": {**options, "score": score}}]
    for count in (3, 6, 9):
        found[f"structured layers, {count} dropped"] = [{"drop_layers": {"count": count}}]
    for turns in (1, 5):
        found[f"compensated int3 rank 16, {turns} turns"] = [{"loftq": {"bits": 3, "turns": turns}}]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="regular expressions, one of which labels must match")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the results to this file, one JSON object a line")
    parser.add_argument("--table", type=Path, help="print the results in this file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        rows = [row for row in stored(arguments.table) if any(re.search(p, row["method"]) for p in arguments.only)]
        sys.stdout.write(markdown(rows))
        return
    torch.set_num_threads(arguments.threads)
    console, failed = Console(), []
    rows = stored(arguments.json) if arguments.json and arguments.json.exists() else []
    rows = [row for row in rows if row["settings"] == settings(arguments)]
    known = {row["method"] for row in rows}
    chosen = [label for pattern in arguments.only for label in methods() if re.search(pattern, label)]
    with tempfile.TemporaryDirectory() as folder:
        apart(prepare, Path(folder), arguments)
        for label in (label for label in dict.fromkeys(chosen) if label not in known):
            row = apart(measure, label, Path(folder), arguments)
            if row is None:
                failed.append(label)
                continue
            rows.append(row)
            console.print({key: value for key, value in row.items() if key != "layers"})
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    console.print(table(rows))
    if failed:
        sys.exit(f"These failed: {', '.join(failed)}")


def settings(arguments: argparse.Namespace) -> dict[str, int]:
    """What rows must share to be compared."""
    return {name: getattr(arguments, name) for name in ("samples", "length", "windows")}


def stored(file: Path) -> list[dict[str, Any]]:
    """The rows that were written, in the order of `methods`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    order = list(methods())
    return sorted(rows, key=lambda row: order.index(row["method"]))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own; None where it fails, with the reason printed there."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send(function(*arguments))
        except Exception:
            traceback.print_exc()
            sender.send(None)

    process = processes.Process(target=call)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes the tokenizer, the merged program, its logits, and the same function with outliers."""
    source = open_model(demo_model())
    shutil.copytree(source.tokenizer_directory, folder / "tokenizer")
    captured = capture(source.model)
    (folder / "captured").mkdir()
    captured.save(folder / "captured")
    program = rewrite(captured, Recipe.load({"passes": ["merge_linear"]}), CPU, CompileOptions(verify=False))
    (folder / "plain").mkdir()
    program.save(folder / "plain")
    (folder / "logits").mkdir()
    accuracy.remember(lambda ids: logits_of(program, ids), held_out(folder, arguments), folder / "logits")
    planted = program.clone()
    head = structure.head(planted)
    with Editor(planted, "outliers") as editor:
        for site in scale_sites(planted):
            if site.maker.target is rms_norm.target and head not in site.readers:
                scale = torch.ones(len(site.free[0]))
                scale[list(AMPLIFIED)] = 1 / FACTOR
                fold_scale(editor, site, scale)
    (folder / "outliers").mkdir()
    planted.save(folder / "outliers")


def held_out(folder: Path, arguments: argparse.Namespace) -> torch.Tensor:
    """The windows that are scored."""
    tokens = Tokenizer(folder / "tokenizer").encode(accuracy.built_in_text(held_out=True))
    return accuracy.token_windows(tokens, 256, arguments.windows)


def measure(label: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rewrites and scores."""
    samples = calibration.from_text(folder / "tokenizer", None, arguments.samples, arguments.length)
    begin = {"outliers": "outliers", "structured": "captured"}.get(re.split("[: ]", label)[0], "plain")
    options = CompileOptions(verify=False, calibration=tuple(samples))
    start = Program.load(folder / begin)
    began = time.process_time()
    with kept_folds() as folds:
        program = rewrite(start, Recipe.load({"passes": methods()[label]}), CPU, options)
    seconds, peak = time.process_time() - began, peak_memory()
    layers = {}
    if ALIKE.search(label):
        layers = layer_errors(folds[0] if folds else start, program, samples[:COMPARED])
    del start, folds
    windows = held_out(folder, arguments)
    known = accuracy.recall(windows, folder / "logits")
    found = accuracy.measure(lambda ids: logits_of(program, ids), windows, reference=known)
    return {
        "method": label,
        "settings": settings(arguments),
        "bytes": sum(tensor.nbytes for tensor in program.weights().values()),
        "bits": next((r.notes["bits_per_weight"] for r in program.history if "bits_per_weight" in r.notes), None),
        "perplexity": found.perplexity,
        "kl": found.mean_kl,
        "layer_error": sum(layers.values()) / len(layers) if layers else None,
        "layers": layers,
        "seconds": seconds,
        "peak_bytes": peak,
    }


def peak_memory() -> int:
    """The most bytes that this process had in memory; `resource` would also count the process that forked it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


@contextmanager
def kept_folds() -> Iterator[list[Program]]:
    """The programs in which AWQ has folded scales and rounded nothing yet: what its layers are compared with."""
    fold, found = Awq.fold, []

    def keep(one: Awq, program: Program, context: Context) -> dict[str, float]:
        strengths = fold(one, program, context)
        found.append(program.clone())
        return strengths

    Awq.fold = keep
    try:
        yield found
    finally:
        Awq.fold = fold


def table(rows: list[dict[str, Any]]) -> Table:
    """For a terminal."""
    made = Table(title="SmolLM2-135M-Instruct, held-out text")
    for column in COLUMNS:
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        made.add_row(*cells(row, rows))
    return made


def markdown(rows: list[dict[str, Any]]) -> str:
    """For a document."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(row, rows) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


COLUMNS = ("method", "MB", "perplexity", "KL nats", "layer error", "at most simplest", "CPU s", "peak GB")


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """One row of a table."""
    error = row["layer_error"]
    return (
        row["method"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['perplexity']:.2f}",
        f"{row['kl']:.4f}",
        "" if error is None else f"{error:.4f}",
        below_simplest(row, rows),
        f"{row['seconds']:.0f}",
        f"{row['peak_bytes'] / 1e9:.1f}",
    )


def below_simplest(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """On how many layers a method's error is at most that of the simplest method in its place."""
    label = row["method"]
    for pattern, simplest in SIMPLEST.items():
        label = re.sub(pattern, simplest, label)
    other = next((other for other in rows if other["method"] == label), row)
    if other is row or not row["layers"] or row["layers"].keys() != other["layers"].keys():
        return ""
    fewer = sum(error <= other["layers"][layer] for layer, error in row["layers"].items())
    return f"{fewer} of {len(row['layers'])}"


if __name__ == "__main__":
    main()
