"""What the order of a recipe means: approximate passes run as listed or are refused, others where they are needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright import registry
from graphwright.errors import RecipeError
from graphwright.manager import plan_passes
from graphwright.pass_ import Pass
from graphwright.recipe import Recipe

FREE = ["static_cache", "select_logits", "merge_linear", "compress_sparse"]
"""Structural and exact ones."""

CHAIN = ["drop_layers", "prune_channels", "svd", "wanda", "gptq", "activations"]
"""Approximate ones, in the one order in which all of them can work."""


def planned(passes: list) -> list[str]:
    return [one.name for one in plan_passes(Recipe.load({"passes": passes}))]


def contradictory(first: str, second: str) -> bool:
    """Whether the first pass must come after the second, of two that depend on each other directly."""
    one, two = registry.pass_class(first), registry.pass_class(second)
    return bool((set(one.requires) | set(one.after)) & set(two.provides))


@given(order=st.permutations([*FREE, *CHAIN]))
@settings(deadline=None, max_examples=60)
def test_every_order_is_kept_or_refused_with_both_sides(order):
    listed = [name for name in order if name in CHAIN]
    if listed == CHAIN:
        wanted = planned([*CHAIN, *FREE])
        assert [n for n in planned(order) if n in CHAIN] == [n for n in wanted if n in CHAIN]
        return
    with pytest.raises(RecipeError) as refusal:
        planned(order)
    late, early = next(
        (a, b) for a in CHAIN for b in CHAIN if f"lists {a} before {b}, which must come first" in str(refusal.value)
    )
    assert listed.index(late) < listed.index(early)
    assert CHAIN.index(early) < CHAIN.index(late)
    assert f"List {early} before {late}" in str(refusal.value)


@given(order=st.permutations(FREE))
@settings(deadline=None, max_examples=24)
def test_passes_that_change_no_numbers_may_stand_anywhere(order):
    plan = planned([*order[:2], "wanda", "gptq", *order[2:]])
    for earlier, later in (("merge_linear", "wanda"), ("wanda", "gptq"), ("gptq", "compress_sparse")):
        assert plan.index(earlier) < plan.index(later)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (["rtn", "wanda"], "rtn works on what is sparse and wanda makes it so"),
        (["wanda", "svd_llm"], "wanda works on what is low_rank and svd_llm makes it so"),
        (["gptq", "prune_heads"], "gptq works on what is pruned and prune_heads makes it so"),
        (["rtn", "cast"], "rtn works on what is float_dtype and cast makes it so"),
        (["activations", "rtn"], "activations works on what is quantized and rtn makes it so"),
    ],
)
def test_a_contradiction_says_why(listed, reason):
    with pytest.raises(RecipeError, match=f"lists {listed[0]} before {listed[1]}.*{reason}"):
        planned(listed)


def test_a_contradiction_through_a_third_pass_names_the_chain(monkeypatch):
    class Pruned(Pass):
        name, kind, provides = "pruned_first", "approximate", ("a",)

    class Between(Pass):
        name, kind, after, provides = "between", "exact", ("a",), ("b",)

    class Last(Pass):
        name, kind, after = "last", "approximate", ("b",)

    chain = "between works on what is a and pruned_first makes it so; last works on what is b and between makes it so"
    with pytest.raises(RecipeError, match=f"lists last before pruned_first, which must come first: {chain}"):
        plan_passes(Recipe(passes=[Last(), Between(), Pruned()]))


def test_approximate_passes_that_do_not_depend_on_each_other_run_as_listed():
    yarn = {"yarn": {"factor": 2}}
    assert [name for name in planned([yarn, "rtn"]) if name in ("yarn", "rtn")] == ["yarn", "rtn"]
    assert [name for name in planned(["rtn", yarn]) if name in ("yarn", "rtn")] == ["rtn", "yarn"]
    assert not contradictory("yarn", "rtn")
