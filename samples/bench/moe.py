"""One mixture-of-experts layer on the CPU: time of a forward against transformers' paths and a dense layer.

    python samples/bench/moe.py
    python samples/bench/moe.py --experts 8 64 128 --top-k 2 8 --tokens 1 8 64 512 --recipes float int4

The layer is Qwen3's block with random weights. `dense` is a gated MLP as wide as the chosen experts together, which is
what a token's work comes to. All take turns; figures are medians in milliseconds, and what the best path of
transformers takes over what ours takes. How a decode step depends on the number of experts at constant active ones is
said at the end. For experts that stay in a file see moe_offload.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable

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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    table = Table(title=f"Width {arguments.hidden}, experts of {arguments.inner}; milliseconds per forward")
    for column in ("experts", "top", "tokens", *PATHS, "dense", *arguments.recipes, "x best path"):
        table.add_column(column, justify="right")
    rows: list[list[str]] = []
    for count in arguments.experts:
        for top_k in arguments.top_k:
            if top_k <= count:
                rows += measured(count, top_k, arguments)
                console.print(f"{count} experts, top {top_k} done")
    for row in rows:
        table.add_row(*row[:-2], row[-1])
    console.print(table)
    for top_k in arguments.top_k:
        ones = {int(row[0]): float(row[-2]) for row in rows if row[1:3] == [str(top_k), "1"]}
        if len(ones) > 1:
            spread = max(ones.values()) / min(ones.values()) - 1
            times = ", ".join(f"{count}: {time:.3f}" for count, time in ones.items())
            console.print(
                f"top {top_k}, 1 token, {arguments.recipes[0]}, ms by experts: {times}; spread {100 * spread:.0f} %"
            )


def measured(count: int, top_k: int, arguments: argparse.Namespace) -> list[list[str]]:
    """One row for every number of tokens."""
    block = make_block(count, top_k, arguments)
    dense = Dense(arguments.hidden, arguments.inner * top_k)
    ours = {name: compiled(block, name) for name in arguments.recipes}
    rows = []
    for tokens in arguments.tokens:
        # Other tokens at each call, so that the same experts are not in the cache every time.
        inputs = [torch.randn(1, tokens, arguments.hidden) for _ in range(16)]
        peers: dict[str, Forward] = {path: through(block, path) for path in PATHS}
        peers |= {"dense": dense, **ours}
        times = interleaved(peers, inputs, arguments.rounds)
        best = min(times[path] for path in PATHS)
        speed = best / times[arguments.recipes[0]]
        shown = [f"{1e3 * times[peer]:.2f}" for peer in peers]
        exact = str(1e3 * times[arguments.recipes[0]])
        rows.append([str(count), str(top_k), str(tokens), *shown, exact, f"{speed:.2f}"])
    return rows


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


def interleaved(peers: dict[str, Forward], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of one call of every peer."""
    samples: dict[str, list[float]] = {name: [] for name in peers}
    with torch.no_grad():
        for forward in peers.values():
            forward(inputs[0])
        for _ in range(rounds):
            for name, forward in peers.items():
                end, calls = time.perf_counter() + ROUND_SECONDS, 0
                while time.perf_counter() < end or calls < 3:
                    started = time.perf_counter()
                    forward(inputs[calls % len(inputs)])
                    samples[name].append(time.perf_counter() - started)
                    calls += 1
    return {name: statistics.median(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
