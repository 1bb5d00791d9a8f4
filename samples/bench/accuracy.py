"""What each quantization method costs in accuracy: SmolLM2, held-out English text, one process per method.

    python samples/bench/accuracy.py --only 'int4' --samples 16 --length 512

Weights of this model lie on a 4-bit grid of blocks of 32, so groups of 64, 128 and whole rows are measured. Bytes are
those of all weights; head and embedding have 8 bits in every quantized program. Peak memory is that of the process
that rewrites. Layer error is the mean over linear layers of the relative error of their outputs, see `layer_errors`,
on four of the calibration windows; rows of gptq and spqr also say on how many layers they are below `rtn` of the same
label. The methods under `outliers` start from a model whose norms were made to amplify a few channels by 64, with the
layers behind them rescaled to match: the same function. Programs are measured as captured, but for the merged linear
layers; those of `structured` are merged after the cut. `--table FILE` prints what `--json FILE` wrote, in Markdown.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
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
COMPARED = 4
"""Calibration windows on which layers are compared."""

W8 = {"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}
DYNAMIC, STATIC = {"activations": {}}, {"activations": {"static": True}}


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
        "zeroquant w8a8": [grouped, DYNAMIC],
        "smoothquant w8a8 dynamic": ["smoothquant", W8, DYNAMIC],
        "smoothquant w8a8 static": ["smoothquant", W8, STATIC],
        "fp8 weights and activations": ["fp8", {"activations": {"format": "fp8_e4m3"}}],
        "llm_int8": ["llm_int8"],
    }
    for label in [name for name in found if "fp8" not in name and "zeroquant" not in name]:
        found[f"outliers: {label}"] = found[label]
    for bits in (8, 4):
        act = {"activations": {"format": f"int{bits}"}}
        found[f"rtn w4a{bits}"] = [{"rtn": {}}, act]
        found[f"gptq w4a{bits}"] = [{"gptq": {}}, act]
        found[f"quarot + gptq w4a{bits}"] = ["quarot", {"gptq": {}}, act]
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
    for removed in (10, 30):
        options = {"ratio": removed / 100}
        for score in ("magnitude", "wanda", "taylor"):
            found[f"structured channels {removed} % {score}"] = [{"prune_channels": {**options, "score": score}}]
    for count in (3, 6):
        found[f"structured layers, {count} dropped"] = [{"drop_layers": {"count": count}}]
    for turns in (1, 5):
        found[f"compensated int3 rank 16, {turns} turns"] = [{"loftq": {"bits": 3, "turns": turns}}]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression that labels must match")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here, one JSON object a line, as they come")
    parser.add_argument("--table", type=Path, help="print the results in this file, and measure nothing")
    parser.add_argument("--worker", nargs=2, metavar=("LABEL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.table:
        sys.stdout.write(markdown([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    if arguments.worker:
        sys.stdout.write(json.dumps(measure(*arguments.worker, arguments)) + "\n")
        return
    console = Console()
    labels = [label for label in methods() if re.search(arguments.only, label)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rows = []
        for label in labels:
            rows.append(run_worker(label, folder))
            console.print({key: value for key, value in rows[-1].items() if key != "layers"})
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    console.print(table(rows))


def prepare(folder: Path) -> None:
    """Writes the merged program, the same function with outliers, and the tokenizer."""
    source = open_model(demo_model())
    shutil.copytree(source.tokenizer_directory, folder / "tokenizer")
    captured = capture(source.model)
    (folder / "captured").mkdir()
    captured.save(folder / "captured")
    program = rewrite(captured, Recipe.load({"passes": ["merge_linear"]}), CPU, CompileOptions(verify=False))
    (folder / "plain").mkdir()
    program.save(folder / "plain")
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


def run_worker(label: str, folder: str) -> dict[str, Any]:
    """Measures one method in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", label, folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(label: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rewrites and scores."""
    tokenizer = Path(folder) / "tokenizer"
    windows = accuracy.token_windows(
        Tokenizer(tokenizer).encode(accuracy.built_in_text(held_out=True)), 256, arguments.windows
    )
    samples = calibration.from_text(tokenizer, None, arguments.samples, arguments.length)
    begin = {"outliers": "outliers", "structured": "captured"}.get(re.split("[: ]", label)[0], "plain")
    options = CompileOptions(verify=False, calibration=tuple(samples))
    start = Program.load(Path(folder) / begin)
    began = time.perf_counter()
    program = rewrite(start, Recipe.load({"passes": methods()[label]}), CPU, options)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact = folded(start, methods()[label], options)
    layers = layer_errors(exact, program, samples[:COMPARED]) if begin != "captured" else {}
    del start, exact
    plain = Program.load(Path(folder) / "plain")
    found = accuracy.measure(lambda ids: logits_of(program, ids), windows, reference=lambda ids: logits_of(plain, ids))
    return {
        "method": label,
        "bytes": sum(tensor.nbytes for tensor in program.weights().values()),
        "bits": next((r.notes["bits_per_weight"] for r in program.history if "bits_per_weight" in r.notes), None),
        "perplexity": found.perplexity,
        "kl": found.mean_kl,
        "layer_error": sum(layers.values()) / len(layers) if layers else None,
        "layers": layers,
        "seconds": seconds,
        "peak_bytes": peak * 1024,
    }


def folded(start: Program, passes: list[Any], options: CompileOptions) -> Program:
    """The program after those passes of a method that change no function: what its layers are compared with."""
    recipe = Recipe.load({"passes": passes})
    exact = [one for one in recipe.passes if one.kind == "exact"]
    program = rewrite(start, Recipe(name="exact", passes=tuple(exact)), CPU, options) if exact else start.clone()
    for one in recipe.passes:
        if isinstance(one, Awq):
            one.fold(program, Context(CPU, calibration=list(options.calibration)))
    return program


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


COLUMNS = ("method", "MB", "perplexity", "KL nats", "layer error", "below rtn", "seconds", "peak GB")


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """One row of a table."""
    error = row["layer_error"]
    return (
        row["method"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['perplexity']:.2f}",
        f"{row['kl']:.4f}",
        "" if error is None else f"{error:.4f}",
        below_nearest(row, rows),
        f"{row['seconds']:.0f}",
        f"{row['peak_bytes'] / 1e9:.1f}",
    )


def below_nearest(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """On how many layers a second-order method's error is at most that of rounding to nearest at the same label."""
    name, _, rest = row["method"].partition(" ")
    nearest = next((other for other in rows if other["method"] == f"rtn {rest}"), None)
    if name not in ("gptq", "awq", "hqq") or nearest is None:
        return ""
    fewer = sum(error <= nearest["layers"][layer] for layer, error in row["layers"].items())
    return f"{fewer} of {len(row['layers'])}"


if __name__ == "__main__":
    main()
