"""Removing experts: exact for those that are never chosen, measured for others."""

import pytest
import torch
from passes.moe.mixture import COUNT, Mixture, captured, only, rows, run

from graphwright.errors import PassError, RecipeError
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import experts, moe_routing, quantized_experts

ROUTINGS = [(2, "softmax", True), (2, "softmax", False, 1.5), (1, "sigmoid", False), (2, "softmax", True, 1.0, 3, 2)]


def lonely(*routing, unused: tuple[int, ...] = (1, 4)) -> Mixture:
    module = Mixture(*routing)
    with torch.no_grad():
        module.bias[list(unused)] = -30.0
    return module


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_removing_experts_that_nobody_chooses_is_exact(routing):
    module = lonely(*routing)
    program = run(captured(module), "prune_experts")
    layer = only(program, experts)
    assert argument(layer, "up").meta["val"].shape[0] == COUNT - 2
    assert program.history[-1].notes["removed"] == {"up": [1, 4]}
    assert program.history[-1].error < 1e-5
    for count in (1, 33, 400):
        assert relative_error(program(x=rows(count, 9))[0], module(rows(count, 9))) < 1e-5


def test_rarely_used_experts_go_first_and_others_take_their_tokens():
    module = Mixture()
    program = run(captured(module), {"prune_experts": {"ratio": 0.5}})
    notes = program.history[-1].notes
    usage = notes["usage"]["up"]
    gone = notes["removed"]["up"]
    assert len(gone) == 3
    assert max(usage[i] for i in gone) <= min(usage[i] for i in range(COUNT) if i not in gone)
    assert 0.01 < program.history[-1].error < 100
    assert notes["kl"] > 0
    # Every token still has two experts whose weights sum to one.
    x = rows(50, 2)
    router = only(program, moe_routing)
    logits = torch.nn.functional.linear(x, module.gate, module.bias)
    given = [
        None if a is None else program.weight(a)
        for a in (argument(router, n) for n in ("correction_bias", "expert_of"))
    ]
    weights, chosen = moe_routing(logits, given[0], 2, "softmax", True, 1.0, 1, 1, given[1])
    assert ((chosen >= 0) & (chosen < 3)).all()
    assert relative_error(weights.sum(1), torch.ones(50)) < 1e-5


def test_as_many_stay_as_a_token_chooses():
    program = run(captured(Mixture(4, "softmax", True)), {"prune_experts": {"ratio": 0.9}})
    assert argument(only(program, experts), "up").meta["val"].shape[0] == 4


def test_pruning_twice_composes():
    module = lonely(unused=(0, 3, 5))
    once = run(captured(module), {"prune_experts": {"ratio": 0.2}})
    assert once.history[-1].notes["removed"]["up"] == [0, 3, 5]
    again = run(once, "prune_experts")
    assert again.history[-1].sites == 0
    assert again.text() == once.text()


def test_it_comes_before_quantization():
    module = lonely()
    program = run(captured(module), "prune_experts", {"rtn": {"bits": 8, "group_size": 0}})
    assert [record.name for record in program.history[-2:]] == ["prune_experts", "rtn"]
    assert argument(only(program, quantized_experts), "up").meta["val"].shape[0] == COUNT - 2
    assert relative_error(program(x=rows(40, 9))[0], module(rows(40, 9))) < 0.05
    with pytest.raises(PassError, match="would undo rtn"):
        run(program, "prune_experts")
    with pytest.raises(RecipeError, match="List prune_experts before rtn"):
        run(captured(module), {"rtn": {"bits": 8, "group_size": 0}}, "prune_experts")
