"""Reports for these tests: a hand-countable module, a plain MLP, and the tiny llama before and after raising."""

import functools

import torch
from families.configs import build
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Metadata, PassRecord, Program
from graphwright.recipe import Recipe
from graphwright.report.collect import Report, collect
from graphwright.target import Target

MACHINE = Target("cpu", "cpu", "x86_64", bandwidth=2e10, flops={"float32": 3e11}, memory_bytes=1 << 34)
EVIL = "<script>alert('x')</script>"


class TwoLinears(nn.Module):
    """Two linears without bias (8x4 and 2x8 floats: 128 + 64 bytes), one relu, one buffer of 2 doubles (16 bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8, bias=False)
        self.second = nn.Linear(8, 2, bias=False)
        self.register_buffer("shift", torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.shift


def two_linears() -> Program:
    torch.manual_seed(0)
    return capture(TwoLinears(), {"x": torch.randn(3, 4)})


def mlp(depth: int) -> Program:
    """`depth` blocks of linear, gelu and layer norm."""
    torch.manual_seed(0)
    blocks = [part for _ in range(depth) for part in (nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))]
    return capture(nn.Sequential(*blocks), {"input": torch.randn(3, 8)})


@functools.cache
def llama(layers: int = 3) -> tuple[Program, Program]:
    """(captured, rewritten with 4-bit weights)."""
    captured = capture(build("llama", num_hidden_layers=layers))
    recipe = Recipe.load("int4")
    manager = PassManager(Context(MACHINE), verify=False)
    return captured, manager.run(captured, plan_passes(recipe, captured))


def report(before: Program, after: Program, **changes: object) -> Report:
    """The report of a compile with made-up times and coverage."""
    facts: dict[str, object] = {
        "recipe": Recipe.load("int4"),
        "target": MACHINE,
        "backend": "inductor",
        "coverage": {"lowered": {"linear": 9}, "fallbacks": {"sort": 1}, "reasons": {"sort": "no kernel for sort"}},
        "seconds": {"capture": 1.5, "rewrite": 2.25},
        "peak_memory_bytes": 1_500_000_000,
    }
    return collect(before, after, **{**facts, **changes})


@functools.cache
def llama_report() -> Report:
    """A full report, with a near miss, speed and accuracy."""
    before, after = llama()
    missed = PassRecord("raise_nothing", "exact", notes={"near_misses": ["the scale is not a constant"]})
    made = report(before, after.with_(history=(*after.history, missed)))
    made.speed = {"decode_tokens_per_second": 61.3, "prefill_tokens_per_second": 412.0, "how": "median of 5 runs"}
    made.accuracy = {"perplexity": 18.42, "mean_kl": 0.071, "greedy_agreement": 0.881, "text": "held-out text"}
    made.artifact_bytes = 98_765
    return made


def evil_report() -> Report:
    """A module, a model and a pass that are called like a script tag."""

    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(EVIL.replace(".", "_"), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return next(self.children())(x)

    program = capture(Evil(), {"x": torch.randn(2, 4)}, metadata=Metadata(name=EVIL, family=EVIL))
    record = PassRecord(EVIL, "exact", options={EVIL: EVIL}, notes={"near_misses": [EVIL], EVIL: {EVIL: EVIL}})
    coverage = {"lowered": {}, "fallbacks": {EVIL: 1}, "reasons": {EVIL: EVIL}}
    return report(program, program.with_(history=(record,)), coverage=coverage, seconds={EVIL: 1.0})
