"""Merging experts: exact for equal ones, the nearest first for others."""

import torch
from passes.moe.mixture import COUNT, Mixture, captured, only, rows, run

from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import experts


def twins(noise: float = 0.0) -> Mixture:
    """Experts 1 and 4 are equal, and so are 2 and 5."""
    module = Mixture()
    with torch.no_grad():
        for one, other in ((1, 4), (2, 5)):
            for stack in (module.up, module.down):
                stack[other] = stack[one] * (1 + noise)
    return module


def test_merging_equal_experts_is_exact():
    module = twins()
    program = run(captured(module), {"merge_experts": {"ratio": 0.34}})
    record = program.history[-1]
    assert record.notes["merged"] == {"up": [[1, 4], [2, 5]]}
    assert record.notes["layer_errors"]["up"] < 1e-6
    assert argument(only(program, experts), "up").meta["val"].shape[0] == COUNT - 2
    for count in (1, 57):
        assert relative_error(program(x=rows(count, 9))[0], module(rows(count, 9))) < 1e-5


def test_the_nearest_are_merged_first_and_their_error_is_measured():
    program = run(captured(twins(0.05)), {"merge_experts": {"ratio": 0.17}})
    record = program.history[-1]
    assert record.notes["merged"]["up"] in ([[1, 4]], [[2, 5]])
    assert 1e-4 < record.notes["layer_errors"]["up"] < 0.1
    assert 0 < record.error < 1


def test_experts_that_are_too_far_apart_stay():
    program = run(captured(Mixture()), {"merge_experts": {"ratio": 0.5, "distance": 0.1}})
    assert program.history[-1].sites == 0
    assert argument(only(program, experts), "up").meta["val"].shape[0] == COUNT


def test_merging_after_pruning_keeps_the_router_whole():
    module = twins()
    with torch.no_grad():
        module.bias[0] = -30.0
    program = run(captured(module), "prune_experts", {"merge_experts": {"ratio": 0.4}})
    assert argument(only(program, experts), "up").meta["val"].shape[0] == COUNT - 3
    assert relative_error(program(x=rows(40, 9))[0], module(rows(40, 9))) < 1e-5
