"""Experts that stay in the artifact's file: equal outputs, within the budget, in what order they are let go."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from families.plain import context
from torch import nn
from torch.nn import functional

import graphwright
from graphwright.backends.tvm.expert_store import ExpertStore
from graphwright.capture import capture
from graphwright.errors import ArtifactError, BackendError, PassError
from graphwright.manager import PassManager, plan_passes
from graphwright.match import argument
from graphwright.ops import experts, fetch_experts, moe_routing
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target

WIDTH, INNER, COUNT, TOP_K = 64, 1024, 12, 2


class Layer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"gate": (COUNT, WIDTH), "up": (COUNT, 2 * INNER, WIDTH), "down": (COUNT, WIDTH, INNER)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * 0.1))

    def forward(self, x):
        weights, indices = moe_routing(functional.linear(x, self.gate), None, TOP_K, "softmax", True)
        return x + experts(x, weights, indices, self.up, None, self.down, None, "silu")


def model() -> nn.Module:
    return nn.Sequential(Layer(1), Layer(2), Layer(3)).eval()


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def compiled(*passes, **options) -> graphwright.compiled.Compiled:
    example, dims = {"input": rows(5, 0)}, {"input": {0: "sequence"}}
    return graphwright.compile(model(), {"passes": [*passes]}, example_inputs=example, dims=dims, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    quarter = {"offload_experts": {"share": 0.25}}
    return compiled("experts", quarter).save(tmp_path_factory.mktemp("offload") / "out")


def resident(folder: Path) -> int:
    """Bytes of the weights' mapping that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line[0].isupper():
            ours = line.endswith(str(folder / "weights.safetensors"))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_outputs_are_equal_and_memory_stays_within_the_budget(folder):
    loaded, reference = graphwright.load(folder), model()
    store = loaded.executable.experts
    size = store.total_bytes // (3 * COUNT)
    assert size == 4 * (2 * INNER * WIDTH + WIDTH * INNER)
    assert store.budget == store.total_bytes // 4
    assert resident(folder) < 2 * size
    for step in range(12):
        x = rows(1, step)
        with torch.no_grad():
            assert float((loaded(input=x)[0] - reference(x)).norm() / reference(x).norm()) < 1e-5
        assert store.resident_bytes <= store.budget
        # Routers come on top, and pages around those that were read, which the next fetch lets go.
        loaded.executable.experts.fetch(0, [])
        assert resident(folder) < 1.3 * store.budget
    assert store.hits > 0
    assert store.misses > 0
    x = rows(50, 99)
    with torch.no_grad():
        assert float((loaded(input=x)[0] - reference(x)).norm() / reference(x).norm()) < 1e-5
    again = store.hits
    loaded(input=x[:1])
    loaded(input=x[:1])
    assert store.hits >= again + 3 * TOP_K  # the second time all are there


def test_two_loaded_artifacts_have_stores_of_their_own(folder):
    first, second = graphwright.load(folder), graphwright.load(folder)
    first(input=rows(1, 0))
    assert first.executable.experts.misses > 0
    assert second.executable.experts.misses == 0


def test_weights_that_are_not_mapped_stay_whole():
    made = compiled("experts", "offload_experts")
    assert made.executable.experts is None
    assert torch.isfinite(made(input=rows(3, 1))[0]).all()


def test_the_graph_guesses_ahead_with_the_next_router():
    example, dims = {"input": rows(5, 0)}, {"input": {0: "sequence"}}
    program = capture(model(), example, dims=dims)
    passes = plan_passes(Recipe.load({"passes": ["experts", "offload_experts"]}), program)
    made = PassManager(context()).run(program, passes)
    fetches = list(made.calls(fetch_experts.target))
    assert [fetch.args[1] for fetch in fetches] == [0, 1, 2]
    assert [argument(fetch, "guess") is not None for fetch in fetches] == [True, True, False]
    assert made.history[-1].error < 1e-6
    assert PassManager(context()).run(made, passes[-1:]).text() == made.text()


class Log(ExpertStore):
    """A store that advises nothing."""

    def __init__(self, budget: int) -> None:
        self.advised: list[tuple[int, int, int]] = []
        self.budget, self.drop_cached = budget, False
        self.hits = self.misses = self.guessed = self.resident_bytes = 0
        self._bytes, self._used, self._ran = [10, 10], OrderedDict(), None

    def _trim(self, layer: int) -> None:
        pass

    def _advise(self, layer: int, expert: int, advice: int) -> None:
        self.advised.append((layer, expert, advice))


def test_the_least_lately_used_are_let_go():
    store = Log(30)
    for chosen in ([1, 2], [3], [1], [4]):
        store.fetch(0, chosen)
    assert list(store._used) == [(0, 3), (0, 1), (0, 4)]
    assert (store.hits, store.misses, store.resident_bytes) == (1, 4, 30)
    store.fetch(0, [5, 6], guess=[7])  # a guess has no room without what is needed now, but for one
    assert list(store._used) == [(0, 5), (0, 6), (1, 7)]
    assert store.guessed == 1
    store.fetch(1, [7, -1])
    assert (store.hits, store.misses) == (2, 6)
    store.fetch(0, [1, 2, 3, 4])  # more than the budget holds at once: all are read
    assert store.resident_bytes == 40
    store.fetch(0, [1])
    store.fetch(0, [8])
    assert store.resident_bytes <= 30


def test_bad_input():
    target = Context(Target.parse("cuda:sm_90"))
    program = capture(model(), {"input": rows(5, 0)}, dims={"input": {0: "sequence"}})
    offload = plan_passes(Recipe.load({"passes": ["experts", "offload_experts"]}), program)[-1]
    with pytest.raises(PassError, match="on CPU targets only"):
        offload.run(program.clone(), target)
    with pytest.raises(PassError, match="budget of 0 bytes"):
        compiled("experts", {"offload_experts": {"share": 0.0}})
    with pytest.raises(BackendError, match="inductor backend cannot leave experts in a file"):
        compiled("experts", "offload_experts", backend="inductor")
    with pytest.raises(ArtifactError, match="not mapped from a file"):
        ExpertStore([[torch.zeros(4, 4)]], [4], 16)
