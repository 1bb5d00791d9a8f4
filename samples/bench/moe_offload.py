"""Layers of experts of which a part is in memory: time of a decode step and how often an expert is there.

    python samples/bench/moe_offload.py
    python samples/bench/moe_offload.py --share 0.5 0.25 --experts 64 --top-k 8 --correlation 0.9

Layers are Qwen3's blocks with random weights, compiled, saved and loaded. A step is one token; tokens follow each other
as a random walk, because experts are used again only where neighbouring tokens are alike (`--correlation 0` gives
independent ones). `resident` has all experts in memory. `cached` lets experts go which the operating system may still
hold, `read` drops those from its cache too, so that each miss is read from the disk. Times are medians in milliseconds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphwright

# PYTHONSAFEPATH keeps a script's own folder off the path; this one is wanted.
sys.path.append(str(Path(__file__).parent))
from moe import RECIPES, make_block


class Layers(nn.Module):
    """Blocks with residuals."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.RMSNorm(next(b.parameters()).shape[-1]) for b in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--correlation", type=float, default=0.9)
    parser.add_argument("--recipe", choices=RECIPES, default="float")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    blocks = [make_block(arguments.experts, arguments.top_k, arguments, seed) for seed in range(arguments.layers)]
    model, steps = Layers(blocks).eval(), walk(arguments)
    table = Table(title=f"{arguments.layers} layers, {arguments.experts} experts, top {arguments.top_k}: ms per token")
    for column in ("share", "guess", "MB of experts", "resident", "cached", "read", "hit rate"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        whole = loaded(model, arguments, Path(folder) / "whole", None)
        resident, outputs = run(whole, steps)
        for share in arguments.share:
            for ahead in (False, True):
                options = {"share": share, "ahead": ahead}
                row = measured(model, arguments, Path(folder) / f"{share}-{ahead}", options, steps, outputs)
                table.add_row(f"{share:g}", str(ahead), row[0], f"{resident:.2f}", *row[1:])
    Console().print(table)


def walk(arguments: argparse.Namespace) -> list[Tensor]:
    """Tokens, each a mixture of the one before and a new one."""
    generator, kept = torch.Generator().manual_seed(0), arguments.correlation
    x, found = torch.randn(1, 1, arguments.hidden, generator=generator), []
    for _ in range(arguments.steps):
        x = kept * x + (1 - kept**2) ** 0.5 * torch.randn(x.shape, generator=generator)
        found.append(x)
    return found


def loaded(model: nn.Module, arguments: argparse.Namespace, folder: Path, offload: dict[str, object] | None):  # type: ignore[no-untyped-def]
    """The layers as an artifact, with experts offloaded or not."""
    passes = [*RECIPES[arguments.recipe], *([] if offload is None else [{"offload_experts": offload}])]
    example = {"x": torch.randn(1, 6, arguments.hidden)}
    dims = {"x": {1: "sequence"}}
    graphwright.compile(model, {"passes": passes}, example_inputs=example, dims=dims).save(folder)
    made = graphwright.load(folder)
    if made.backend != "tvm":
        raise SystemExit(f"The layers were compiled by {made.backend}: {made.report.coverage['passed_over']}")
    return made


def run(made, steps: list[Tensor]) -> tuple[float, list[Tensor]]:  # type: ignore[no-untyped-def]
    """Median milliseconds of a step after the first tenth, and the outputs."""
    times, outputs = [], []
    for x in steps:
        started = time.perf_counter()
        outputs.append(made(x=x)[0].clone())
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[len(times) // 10 :]), outputs


def measured(model, arguments, folder, options, steps, outputs) -> list[str]:  # type: ignore[no-untyped-def]
    """Megabytes in memory, milliseconds with and without the system's cache, and the hit rate."""
    made = loaded(model, arguments, folder, options)
    store = made.executable.experts
    cached, found = run(made, steps)
    if not all(torch.equal(one, other) for one, other in zip(found, outputs, strict=True)):
        raise SystemExit("Outputs with offloaded experts differ")
    store.hits = store.misses = 0
    store.drop_cached = True
    store.fetch(0, range(arguments.experts))
    read, _ = run(made, steps)
    megabytes = f"{store.resident_bytes / 1e6:.0f} of {store.total_bytes / 1e6:.0f}"
    return [megabytes, f"{cached:.2f}", f"{read:.2f}", f"{store.hit_rate:.2f}"]


if __name__ == "__main__":
    main()
