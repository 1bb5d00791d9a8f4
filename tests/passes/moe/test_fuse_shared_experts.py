"""Shared experts among the routed ones: the same function."""

import pytest
import torch
from families.cache import captured as family
from passes.moe.mixture import COUNT, INNER, Mixture, captured, only, rows, run

from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import experts, gated_activation, moe_routing


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("shared", "parts"), [(INNER, 1), (2 * INNER, 2), (INNER + 9, 2)])
def test_fused_experts_are_the_same_function(shared, parts, weighed):
    module = Mixture(2, "softmax", False, 1.5, shared=shared, weighed=weighed)
    program = run(captured(module), "fuse_shared_experts")
    layer, router = only(program, experts), only(program, moe_routing)
    assert argument(layer, "up").meta["val"].shape == (COUNT + parts, 2 * INNER, 12)
    assert (argument(router, "num_shared"), argument(router, "first_shared")) == (parts, COUNT)
    assert not list(program.calls(gated_activation.target))
    for count in (1, 30):
        assert relative_error(program(x=rows(count, 9))[0], module(rows(count, 9))) < 1e-5
    assert run(program, "fuse_shared_experts").text() == program.text()


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_families(name):
    _, program = family(name)
    fused = run_plain(program, "merge_linear", "experts", "fuse_shared_experts")
    assert fused.history[-1].sites == 2
    assert all(argument(router, "num_shared") > 0 for router in fused.calls(moe_routing.target))


def run_plain(program, *passes):
    from families.plain import context

    from graphwright.manager import PassManager, plan_passes
    from graphwright.recipe import Recipe

    return PassManager(context()).run(program, plan_passes(Recipe.load({"passes": [*passes]}), program))


def test_fusion_comes_after_pruning():
    module = Mixture(shared=INNER)
    with torch.no_grad():
        module.bias[2] = -30.0
    program = run(captured(module), "prune_experts", "fuse_shared_experts")
    assert argument(only(program, moe_routing), "first_shared") == COUNT - 1
    assert relative_error(program(x=rows(40, 9))[0], module(rows(40, 9))) < 1e-5


def test_what_is_much_narrower_stays_and_is_reported():
    module = Mixture(shared=INNER // 2)
    program = run(captured(module), "fuse_shared_experts")
    assert "8 wide, and experts are 16" in program.history[-1].notes["left"][0]
    assert list(program.calls(gated_activation.target))
