"""One mixture-of-experts layer on the CPU: time of a forward against transformers' paths and a dense layer.

    python samples/bench/moe.py
    python samples/bench/moe.py --experts 8 64 128 --top-k 2 8 --tokens 1 8 64 512 --recipes float int4
    python samples/bench/moe.py --busy

The layer is Qwen3's block with random weights. `dense` is a gated MLP as wide as the chosen experts together, which is
what a token's work comes to. All take turns; figures are medians in milliseconds, and how often what the best path of
transformers takes contains what ours takes. `batched_mm` copies the weights of every choice, and is left out (`-`)
where they take more than a quarter of a gigabyte. Rows of one token are said again with cold caches, as a step finds
them after all other layers of a model: other memory is read between calls, so that few experts are not faster than
many only because they stay in the cache. `--busy` counts the processor time of one thread, which other processes on
the machine lengthen less than they do the time on the wall. For experts that stay in a file see moe_offload.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import graphwright

RECIPES = {
    "float": ["experts"],
    "int8": ["experts", {"rtn": {"bits": 8, "group_size": 0}}],
    "int4": ["experts", {"rtn": {"bits": 4, "group_size": 32}}],
}
PATHS = ("grouped_mm", "batched_mm")
ROUND_SECONDS = 0.3
"""Time that one peer is called for before the next has its turn."""
MOST_GATHERED = 1 << 28
"""Bytes of copied weights."""
OTHER_BYTES = 768 << 20
"""What is read between calls with cold caches."""
COLD_CALLS = 9

Forward = Callable[[Tensor], object]


class Dense(nn.Module):
    """A gated MLP."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["float", "int4"])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--busy", action="store_true", help="processor time of one thread, on a machine that others use"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.busy else arguments.threads)
    console = Console(width=110)
    table = Table(title=f"Width {arguments.hidden}, experts of {arguments.inner}; milliseconds per forward")
    cold = Table(title="One token with cold caches; milliseconds per forward")
    peers = (*PATHS, "dense", *arguments.recipes, *(f"x {name}" for name in arguments.recipes))
    for column in ("experts", "top", "tokens", *peers):
        table.add_column(column, justify="right")
        cold.add_column(column, justify="right")
    for top_k in arguments.top_k:
        for count in arguments.experts:
            if top_k <= count:
                measured(count, top_k, arguments, table, cold)
    console.print(table)
    console.print(cold)


def measured(count: int, top_k: int, arguments: argparse.Namespace, table: Table, cold: Table) -> None:
    """Adds one row for every number of tokens, and one for a token with cold caches."""
    block = make_block(count, top_k, arguments)
    fixed: dict[str, Forward] = {"dense": Dense(arguments.hidden, arguments.inner * top_k)}
    fixed |= {name: compiled(block, name) for name in arguments.recipes}
    for tokens in arguments.tokens:
        # Other tokens at each call, so that the same experts are not in the cache every time.
        inputs = [torch.randn(1, tokens, arguments.hidden) for _ in range(16)]
        gathered = 4 * tokens * top_k * 3 * arguments.hidden * arguments.inner
        paths = [path for path in PATHS if path != "batched_mm" or gathered <= MOST_GATHERED]
        peers = {**{path: through(block, path) for path in paths}, **fixed}
        row = [str(count), str(top_k), str(tokens)]
        row += shown(interleaved(peers, inputs, arguments), arguments)
        table.add_row(*row)
        print(*row, flush=True)
        if tokens == 1:
            row = [*row[:3], *shown(after_others(peers, inputs, arguments), arguments)]
            cold.add_row(*row)
            print(*row, "cold", flush=True)


def shown(times: dict[str, float], arguments: argparse.Namespace) -> list[str]:
    """Milliseconds of every peer, and the best path of transformers over each recipe."""
    best = min(times[path] for path in PATHS if path in times)
    names = (*PATHS, "dense", *arguments.recipes)
    figures = [f"{1e3 * times[name]:.2f}" if name in times else "-" for name in names]
    return figures + [f"{best / times[name]:.2f}" for name in arguments.recipes]


def make_block(count: int, top_k: int, arguments: argparse.Namespace, seed: int = 0) -> nn.Module:
    """A layer of its own, with random weights."""
    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden, moe_intermediate_size=arguments.inner, num_experts=count,
        num_experts_per_tok=top_k, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = PATHS[0]
    block = Qwen3MoeSparseMoeBlock(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    return block


def through(block: nn.Module, path: str) -> Forward:
    """The layer by one of transformers' implementations."""

    def forward(x: Tensor) -> object:
        for module in block.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = path
        return block(x)

    return forward


def compiled(block: nn.Module, recipe: str) -> Forward:
    """The layer compiled by Graphwright, for any number of tokens."""
    example = {"hidden_states": torch.randn(1, 6, next(block.parameters()).shape[-1])}
    made = graphwright.compile(
        block, {"passes": RECIPES[recipe]}, example_inputs=example, dims={"hidden_states": {1: "sequence"}}
    )
    if made.backend != "tvm":
        raise SystemExit(f"The layer was compiled by {made.backend}: {made.report.coverage['passed_over']}")
    return lambda x: made.executable({"hidden_states": x})


def clock(arguments: argparse.Namespace) -> Callable[[], float]:
    """What counts seconds."""
    return time.thread_time if arguments.busy else time.perf_counter


def interleaved(peers: dict[str, Forward], inputs: list[Tensor], arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one call of every peer."""
    samples: dict[str, list[float]] = {name: [] for name in peers}
    now = clock(arguments)
    with torch.no_grad():
        for forward in peers.values():
            forward(inputs[0])
        for _ in range(arguments.rounds):
            for name, forward in peers.items():
                end, calls = now() + ROUND_SECONDS, 0
                while now() < end or calls < 3:
                    started = now()
                    forward(inputs[calls % len(inputs)])
                    samples[name].append(now() - started)
                    calls += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def after_others(peers: dict[str, Forward], inputs: list[Tensor], arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one call of every peer, each after other memory was read."""
    other = numpy.ones(OTHER_BYTES // 8)  # not torch's, whose threads would still be awake
    samples: dict[str, list[float]] = {name: [] for name in peers}
    now = clock(arguments)
    with torch.no_grad():
        for call in range(COLD_CALLS):
            for name, forward in peers.items():
                other.sum()
                started = now()
                forward(inputs[call % len(inputs)])
                samples[name].append(now() - started)
    return {name: statistics.median(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
