"""Counting which experts are used."""

import torch
from passes.moe.mixture import Mixture, captured, rows, run
from torch.nn import functional

from graphwright.ops import moe_routing


def test_choices_are_counted_and_nothing_changes():
    module = Mixture()
    before = run(captured(module), "experts")
    program = run(before.clone(), "expert_usage")
    x = torch.cat([rows(64, seed) for seed in (5, 6)])
    with torch.no_grad():
        _, chosen = moe_routing(functional.linear(x, module.gate, module.bias), None, *module.routing)
    notes = program.history[-1].notes
    assert notes["usage"] == {"up": torch.bincount(chosen.flatten(), minlength=6).tolist()}
    assert notes["dropped"] == {}
    assert program.text() == before.text()


def test_what_a_capacity_drops_is_told():
    program = run(captured(Mixture()), {"capacity": {"tokens": 4}}, "expert_usage")
    notes = program.history[-1].notes
    assert max(notes["usage"]["up"]) <= 2 * 4
    assert abs(notes["dropped"]["up"] - (1 - sum(notes["usage"]["up"]) / 256)) < 1e-9
