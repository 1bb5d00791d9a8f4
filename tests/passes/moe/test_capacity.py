"""Capacities: what is dropped is what the rule says, and is reported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.moe.mixture import COUNT, Mixture, captured, only, rows, run
from torch.nn import functional

from graphwright.errors import PassError
from graphwright.numerics import relative_error
from graphwright.ops import expert_capacity, experts, moe_routing


def by_hand(weights: torch.Tensor, indices: torch.Tensor, limit: int) -> tuple[torch.Tensor, int]:
    """Weights with those beyond the limit set to zero, choice by choice."""
    taken, kept, dropped = {}, weights.clone(), 0
    for place in range(indices.shape[1]):
        for token in range(indices.shape[0]):
            expert = int(indices[token, place])
            taken[expert] = taken.get(expert, 0) + 1
            if taken[expert] > limit:
                kept[token, place] = 0
                dropped += 1
    return kept, dropped


@pytest.mark.parametrize(("options", "limit"), [({"tokens": 3}, 3), ({"factor": 1.0}, 7)])
def test_tokens_beyond_the_capacity_are_dropped(options, limit):
    module = Mixture()
    program = run(captured(module), {"capacity": options})
    x = rows(20, 9)
    with torch.no_grad():
        weights, indices = moe_routing(functional.linear(x, module.gate, module.bias), None, *module.routing)
        kept, dropped = by_hand(weights, indices, limit)
        expected = experts(x, kept, indices, module.up, None, module.down, None, "silu")
    assert dropped > 0
    assert relative_error(program(x=x)[0], expected) < 1e-5
    share = program.history[-1].notes["dropped"]["up"]
    assert 0 < share < 1
    assert program.history[-1].notes["kl"] > 0


def test_a_large_capacity_drops_nothing():
    module = Mixture()
    program = run(captured(module), {"capacity": {"factor": float(COUNT)}})
    assert program.history[-1].notes["dropped"] == {"up": 0.0}
    assert relative_error(program(x=rows(30))[0], module(rows(30))) < 1e-6
    assert run(program, "capacity").text() == program.text()


def test_golden_text():
    program = run(captured(Mixture()), {"capacity": {"tokens": 2}})
    lines = program.text(shapes=False).splitlines()
    assert [line.partition(" = ")[2].partition("(")[0] for line in lines[2:8]] == [
        "moe_routing", "getitem", "getitem", "expert_capacity", "getitem", "getitem",
    ]  # fmt: skip
    assert only(program, expert_capacity).args[2:] == (COUNT, 2, 0.0)


def test_capacity_zero_is_refused():
    with pytest.raises(PassError, match="capacity 0 takes no token"):
        run(captured(Mixture()), {"capacity": {"factor": 0}})
    with pytest.raises(ValueError, match="one of them must be positive"):
        expert_capacity.reference(torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int64), 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_no_expert_takes_more_than_its_capacity_and_every_drop_is_counted(tokens, top_k, count, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, tokens, top_k, generator=generator) + 0.1
    indices = torch.randint(-1, count, (2, tokens, top_k), generator=generator)
    kept, chosen, dropped = expert_capacity(weights, indices, count, limit)
    for sequence in range(2):
        used = torch.bincount(chosen[sequence][chosen[sequence] >= 0], minlength=count)
        asked = torch.bincount(indices[sequence][indices[sequence] >= 0], minlength=count)
        assert torch.equal(used, asked.clamp(max=limit))
    assert int(dropped.sum()) == int(((indices >= 0) & (chosen < 0)).sum())
    assert torch.equal(kept != 0, (indices < 0) | (chosen >= 0))
