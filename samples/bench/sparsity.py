"""What weights without zeros, and a model with parts cut out, bring on the CPU: bytes, speed, perplexity.

    python samples/bench/sparsity.py kernels --shape 2048x4096 --rows 1 4 64
    python samples/bench/sparsity.py programs --folder compiled --rounds 0
    python samples/bench/sparsity.py programs --folder compiled --rounds 5

`kernels` times one linear layer with a dense weight and with one that keeps two in four, in turns; weights are taken
from more copies than the cache holds, and the least of the times counts. `programs` compiles SmolLM2 by each recipe
into artifacts, then lets all take turns, one of them in memory at a time: medians of decode after 128 tokens and of a
prefill of 512, bytes of all weights, perplexity on held-out text. What `--folder` holds already is not compiled again,
so that the long part need not run where it is quiet. What is pruned by magnitude has no use but its speed;
`accuracy.py` compares methods.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tvm import tirx

import graphwright
from graphwright import accuracy, packing, speed
from graphwright.backends.tvm.machine import tvm_target
from graphwright.backends.tvm.threads import follow_torch
from graphwright.compiled import CompileOptions
from graphwright.engine.tokenizer import Tokenizer
from graphwright.kernels.tir import tiles
from graphwright.kernels.tir.float_linear import matrix as float_matrix
from graphwright.kernels.tir.float_linear import vector as float_vector
from graphwright.kernels.tir.isa import choose
from graphwright.kernels.tir.linear import Linear
from graphwright.kernels.tir.quantized_linear import code_row, matrix, vector
from graphwright.sources import demo_model, open_model
from graphwright.sparsity import Pattern, compress
from graphwright.target import Target

CPU = Target.parse("cpu")
BEYOND_CACHE = 96e6
"""Bytes of copies that a round walks through."""

KINDS = {
    # format, weights that share a scale (0: a row), activations as codes, codes that share a step
    "float32": ("", 0, False, 0),
    "int8": ("int8", 0, False, 0),
    "int4": ("int4", 64, False, 0),
    "int8, rounded activations": ("int8", 0, True, 0),
    "int4, rounded activations": ("int4", 64, True, 32),
}

CACHED = ["merge_linear", "static_cache", "select_logits"]
HALVED, STORED = {"magnitude": {"pattern": "2:4"}}, "compress_sparse"
INT4 = {"rtn": {"bits": 4, "group_size": 64}}
ROUNDED = {"activations": {"group_size": 32}}


def recipes() -> dict[str, list[Any]]:
    """The passes of every program by its label."""
    found: dict[str, list[Any]] = {
        "float32": [],
        "float32, 2:4": [HALVED, STORED],
        "int4": [INT4],
        "int4, 2:4": [HALVED, INT4, STORED],
        "int4, rounded activations": [INT4, ROUNDED],
        "int4, rounded activations, 2:4": [HALVED, INT4, ROUNDED, STORED],
    }
    for percent in (10, 20, 30):
        found[f"{percent} % of channels"] = [{"prune_channels": {"ratio": percent / 100}}]
        found[f"{percent} % of layers"] = [{"drop_layers": {"count": 30 * percent // 100}}]
    found["1 of 3 key-value heads"] = [{"prune_heads": {"ratio": 0.34}}]
    return {label: [*CACHED, *passes] for label, passes in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kernels", "programs"))
    parser.add_argument("--shape", default="2048x4096", help="N x K of the layer")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--only", default="", help="regular expression that labels must match")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="programs: keeps artifacts here, and takes those that are there")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 256 tokens")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 256 tokens")
    parser.add_argument(
        "--thread-time", action="store_true", help="kernels: count the thread's time; needs --threads 1"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    follow_torch()
    Console().print(kernels(arguments) if arguments.what == "kernels" else programs(arguments))


# Kernels


def kernels(arguments: argparse.Namespace) -> Table:
    """Every format at every number of rows."""
    outputs, width = (int(size) for size in arguments.shape.split("x"))
    table = Table(title=f"A weight of {outputs} x {width}, microseconds")
    for column in ("weight", "rows", "dense", "2:4", "x faster", "bytes"):
        table.add_column(column, justify="left" if column == "weight" else "right")
    clock = time.thread_time if arguments.thread_time else time.perf_counter
    for name, kind in KINDS.items():
        if not re.search(arguments.only, name):
            continue
        for rows in arguments.rows:
            runs = [layer(outputs, width, kind, rows, halved, clock) for halved in (False, True)]
            times = [[run() for run, _ in runs] for _ in range(arguments.rounds)]
            dense, half = (1e6 * min(column) for column in zip(*times, strict=True))
            share = runs[1][1] / runs[0][1]
            table.add_row(name, str(rows), f"{dense:.0f}", f"{half:.0f}", f"{dense / half:.2f}", f"{share:.0%}")
    return table


def layer(
    outputs: int, width: int, kind: Sequence[Any], rows: int, halved: bool, clock: Callable[[], float]
) -> tuple[Callable[[], float], int]:
    """A function that times one call, and the bytes of the weight."""
    format, group, coded, code_group = kind
    weight = stored(outputs, width, format, group or width, halved)
    described = Linear(
        outputs,
        width,
        format or "float32",
        group or width,
        format == "int4",
        "float16" if format else "",
        code_group=code_group,
        halved=halved,
    )
    isa, lead = choose(CPU.features), (1, 1) if rows == 1 else (tirx.Var("b", "int64"), tirx.Var("s", "int64"))
    if coded:
        x = torch.randint(-1 << 31, 1 << 31, (1, rows, code_row(described).bytes // 4), dtype=torch.int64)
        x = x.int().view(torch.int8)
        function = vector(described, isa, lead) if rows == 1 else matrix(described, isa, lead)
    else:
        x = torch.randn(1, rows, width)
        one = float_vector(described, isa.lanes, lead, isa.pick_floats) if rows == 1 else None
        function = one or float_matrix(described, isa.lanes, lead)
    call, size = built(function), sum(part.nbytes for part in weight)
    copies = [[part.clone() for part in weight] for _ in range(max(1, int(BEYOND_CACHE // size)))]
    out = torch.empty(1, rows, outputs)

    def run() -> float:
        started = clock()
        for copy in copies:
            call(x, *copy, out)
        return (clock() - started) / len(copies)

    return run, size


def stored(outputs: int, width: int, format: str, group: int, halved: bool) -> list[Tensor]:
    """A random weight in tiles, as kernels take it."""
    dense = torch.randn(outputs, width)
    values, places = compress(dense * Pattern(2, 4).keep(torch.rand_like(dense), 0.5))
    where = [tiles.tile_places(places, width // 4)] if halved else []
    if not format:
        return [tiles.tile_halves(values, "", 0) if halved else tiles.tile_floats(dense).contiguous(), *where]
    kind, shape = packing.FORMATS[format], (2 * outputs, width // 4) if halved else (outputs, width)
    inside = group // 4 if halved else group
    packed = packing.pack(torch.randint(kind.low, kind.high + 1, shape), format, inside)
    codes = tiles.tile_halves(packed, format, group) if halved else tiles.tile_codes(packed, format, group)
    scale = tiles.tile_groups(torch.rand(outputs, width // group).half())
    zero = torch.full((outputs, width // group), 7, dtype=torch.uint8)
    return [codes, *where, scale, *([tiles.tile_zero_points(zero, format)] if format == "int4" else [])]


def built(function: tirx.PrimFunc) -> Callable[..., None]:
    """The compiled kernel."""
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return tvm.compile(module, target=tvm_target(CPU))["kernel"]


# Programs


def programs(arguments: argparse.Namespace) -> Table:
    """Every recipe."""
    labels = [label for label in recipes() if re.search(arguments.only, label)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        facts = {label: compiled(label, folder / re.sub(r"\W+", "-", label), arguments) for label in labels}
        rounds = [{label: timed(facts[label]["artifact"]) for label in labels} for _ in range(arguments.rounds)]
    table = Table(title="SmolLM2-135M, batch 1")
    for column in ("program", "backend", "weights MB", "decode tok/s", "prefill tok/s", "perplexity"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for label in labels:
        found, speeds = facts[label], [r[label] for r in rounds]
        decode = f"{statistics.median(s.decode_tokens_per_second for s in speeds):.1f}" if rounds else ""
        prefill = f"{statistics.median(s.prefill_tokens_per_second for s in speeds):.0f}" if rounds else ""
        size, perplexity = f"{found['bytes'] / 1e6:.0f}", f"{found['perplexity']:.2f}"
        table.add_row(label, found["backend"], size, decode, prefill, perplexity)
    return table


def compiled(label: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles a recipe into `folder`, unless it is there; returns its artifact, backend, bytes and perplexity."""
    artifact, noted = folder / "artifact", folder / "facts.json"
    if not noted.exists():
        Console().print(f"compiling {label}")
        options = CompileOptions(verify=False, calibration_samples=arguments.samples, calibration_length=256)
        one = graphwright.compile(demo_model(), {"passes": recipes()[label]}, "cpu", options=options)
        # The tokenizer's files go when the source does.
        source = open_model(demo_model())
        text = Tokenizer(source.tokenizer_directory).encode(accuracy.built_in_text(held_out=True))
        windows = accuracy.token_windows(text, 256, arguments.windows)
        facts = {
            "backend": one.backend,
            "bytes": sum(weight.nbytes for weight in one.program.weights().values()),
            "perplexity": accuracy.measure(one.logits, windows).perplexity,
        }
        folder.mkdir(parents=True, exist_ok=True)
        one.save(artifact, overwrite=True)
        noted.write_text(json.dumps(facts))
    return {"artifact": artifact, **json.loads(noted.read_text())}


def timed(artifact: Path) -> speed.Speed:
    """One round."""
    one = graphwright.load(artifact)
    vocabulary = one.program.metadata.vocab_size
    return speed.measure(one.executable, one.program.contract, vocabulary, new_tokens=32, repetitions=1)


if __name__ == "__main__":
    main()
