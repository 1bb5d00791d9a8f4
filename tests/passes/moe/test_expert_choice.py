"""Experts that choose tokens."""

import pytest
import torch
from passes.moe.mixture import COUNT, Mixture, captured, only, rows, run
from torch.nn import functional

from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import expert_choice, moe_routing


def naive(module: Mixture, x: torch.Tensor, limit: int) -> torch.Tensor:
    scores = functional.linear(x, module.gate, module.bias).softmax(-1)
    result = torch.zeros_like(x)
    for expert in range(COUNT):
        values, taken = scores[:, expert].topk(min(limit, len(x)))
        gate, up = functional.linear(x[taken], module.up[expert]).chunk(2, -1)
        result.index_add_(
            0, taken, functional.linear(functional.silu(gate) * up, module.down[expert]) * values[:, None]
        )
    return result


@pytest.mark.parametrize(("factor", "tokens", "limit"), [(0.0, 24, 8), (1.5, 20, 5), (3.0, 7, 4), (2.0, 1, 1)])
def test_every_expert_takes_the_same_number_of_tokens(factor, tokens, limit):
    module = Mixture()
    program = run(captured(module), {"expert_choice": {"factor": factor}})
    x = rows(tokens, 9)
    with torch.no_grad():
        assert relative_error(program(x=x)[0], naive(module, x, limit)) < 1e-5
    layer = only(program, expert_choice)
    logits = functional.linear(x, module.gate, module.bias)
    _, chosen = expert_choice(logits, argument(layer, "capacity"), argument(layer, "factor"))
    assert [(chosen == expert).sum().item() for expert in range(COUNT)] == [limit] * COUNT
    assert not list(program.calls(moe_routing.target))
    assert program.history[-1].notes["kl"] > 0


def test_routers_with_groups_stay():
    program = run(captured(Mixture(2, "softmax", True, 1.0, 3, 2)), "expert_choice")
    assert "groups or a capacity" in program.history[-1].notes["near_misses"][0]
    assert not list(program.calls(expert_choice.target))


def test_no_capacity_is_refused():
    with pytest.raises(ValueError, match="one of them must be positive"):
        expert_choice.reference(torch.randn(4, 3))
