"""Fewer experts per token: a smaller top-k, or choices of little weight skipped."""

import pytest
import torch
from passes.moe.mixture import Mixture, captured, only, rows, run
from torch.nn import functional

from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import experts, moe_routing


def test_a_smaller_top_k_is_the_model_with_that_top_k():
    module = Mixture(4, "softmax", True)
    program = run(captured(module), {"fewer_active_experts": {"top_k": 2}})
    module.routing = (2, "softmax", True)
    assert relative_error(program(x=rows(21, 9))[0], module(rows(21, 9))) < 1e-5
    notes = program.history[-1].notes
    assert (notes["active_before"]["up"], notes["active"]["up"]) == (4.0, 2.0)
    assert notes["kl"] > 0
    assert argument(only(program, experts), "indices").meta["val"].shape[1] == 2


@pytest.mark.parametrize("normalize", [True, False])
def test_choices_of_little_weight_are_skipped(normalize):
    module = Mixture(3, "softmax", normalize)
    program = run(captured(module), {"fewer_active_experts": {"skip_ratio": 0.5}})
    x = rows(40, 9)
    with torch.no_grad():
        scores = functional.linear(x, module.gate, module.bias).softmax(-1)
        weights, chosen = scores.topk(3)
        kept = weights * (weights >= 0.5 * weights[:, :1])
        kept = kept / kept.sum(1, keepdim=True) if normalize else kept
        expected = experts(x, kept, chosen, module.up, None, module.down, None, "silu")
    assert relative_error(program(x=x)[0], expected) < 1e-5
    assert 1 <= program.history[-1].notes["active"]["up"] < 3


def test_the_ratio_is_measured_when_it_is_left_out():
    program = run(captured(Mixture()), "fewer_active_experts")
    notes = program.history[-1].notes
    assert 0 < notes["skip_ratio"]["up"] < 1
    # The median of the second weight over the first: half of the second choices go.
    assert abs(notes["active"]["up"] - 1.5) < 0.02


def test_nothing_is_skipped_at_ratio_zero():
    module = Mixture()
    program = run(captured(module), {"fewer_active_experts": {"skip_ratio": 0.0}})
    assert relative_error(program(x=rows(30))[0], module(rows(30))) < 1e-6


def test_more_experts_than_before_are_refused():
    with pytest.raises(PassError, match="top_k is 3, and tokens choose 2 experts"):
        run(captured(Mixture()), {"fewer_active_experts": {"top_k": 3}})


def test_top_k_above_the_number_of_experts_is_refused():
    with pytest.raises(ValueError, match="top_k is 7, but there are 6"):
        moe_routing(torch.randn(3, 6), None, 7)
