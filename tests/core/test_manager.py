"""Order, contracts, verification, budgets and bisect of the pass manager."""

import pytest
import torch
from families.cache import captured

from graphwright import manager, registry
from graphwright.bisect import bisect, kl_test
from graphwright.errors import BudgetError, GraphwrightError, PassError, RecipeError, VerificationError
from graphwright.manager import PassManager, pass_diff, plan_passes
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.recipe import Recipe
from graphwright.rewrite import Editor
from graphwright.target import Target

aten = torch.ops.aten
CPU = Target.parse("cpu")


class Wrong(Pass):
    """Says it is exact and multiplies one node by a little more than one."""

    name = "wrong"
    kind = "exact"
    after = ("linear",)

    def run(self, program, context):
        with Editor(program, self.name, context.fuel) as editor:
            for node in list(program.calls(aten.linear.default))[3:4]:
                if editor.allow(node):
                    new = editor.call(aten.mul.Tensor, node, 1.01, before=node.next)
                    editor.replace(node, new)
        return PassResult(program, editor.sites)


class Lying(Pass):
    """Provides what it does not."""

    name = "lying"
    kind = "exact"
    provides = ("nothing",)

    def run(self, program, context):
        return PassResult(program)

    def leftover(self, program):
        return "linear_0 is still there"


class Crashing(Pass):
    """Fails inside."""

    name = "crashing"
    kind = "exact"

    def run(self, program, context):
        raise ZeroDivisionError("oops")


def run(name: str, passes, **settings):
    _, program = captured(name)
    return PassManager(Context(CPU), **settings).run(program, passes)


def test_plan_adds_what_is_required_and_orders_it():
    plan = [
        p.name
        for p in plan_passes(Recipe(passes=["select_logits", "static_cache", {"rtn": {"bits": 8}}, "merge_linear"]))
    ]
    for earlier, later in (
        ("raise_attention", "raise_mask"),
        ("raise_mask", "static_cache"),
        ("raise_rope", "static_cache"),
        ("raise_linear", "merge_linear"),
        ("merge_linear", "rtn"),
        ("static_cache", "select_logits"),
    ):
        assert plan.index(earlier) < plan.index(later)


def test_conflicts_name_both_sides():
    with pytest.raises(RecipeError, match="rtn excludes quantized, which comes from rtn"):
        plan_passes(Recipe(passes=["rtn", {"rtn": {"bits": 8}}]))


def test_cycles_are_refused(monkeypatch):
    class First(Lying):
        name = "first"
        requires = ("b",)
        provides = ("a",)

    class Second(Lying):
        name = "second"
        requires = ("a",)
        provides = ("b",)

    with pytest.raises(RecipeError, match="first needs second|second needs first"):
        manager._order([First(), Second()])


def test_a_requirement_that_nobody_provides():
    class Wanting(Lying):
        name = "wanting"
        requires = ("unobtainium",)

    with pytest.raises(RecipeError, match="wanting requires unobtainium, which no pass provides"):
        plan_passes(Recipe(passes=[Wanting()]))


def test_a_wrong_exact_pass_is_caught_and_its_node_named():
    with pytest.raises(VerificationError, match="Pass wrong is declared exact but changed the outputs") as caught:
        run("llama", [Wrong()])
    assert "modeling_llama" in caught.value.where


def test_without_verification_it_passes():
    assert run("llama", [Wrong()], verify=False).history[-1].sites == 1


def test_a_pass_that_does_not_provide_what_it_says():
    with pytest.raises(PassError, match="lying says it provides nothing, but linear_0 is still there"):
        run("llama", [Lying()])


def test_a_crash_names_the_pass():
    with pytest.raises(PassError, match="crashing failed with ZeroDivisionError: oops"):
        run("llama", [Crashing()])


def test_the_input_program_is_not_changed():
    _, program = captured("llama")
    before = program.text()
    PassManager(Context(CPU)).run(program, plan_passes(Recipe.load("int4"), program))
    assert program.text() == before


def test_approximate_passes_are_measured_and_budgets_hold():
    _, program = captured("llama")
    recipe = Recipe.load({"passes": [{"rtn": {"bits": 4, "group_size": 16}}]})
    rewritten = PassManager(Context(CPU), recipe.budget).run(program, plan_passes(recipe, program))
    record = rewritten.history[-1]
    assert 0 < record.notes["kl"] < 20
    assert 0 < max(record.notes["layer_errors"].values()) < 0.5
    strict = Recipe.load({"passes": recipe.to_data()["passes"], "budget": {"kl": 1e-6}})
    with pytest.raises(BudgetError, match="KL divergence of .* budget is 1e-06.*worst layer"):
        PassManager(Context(CPU), strict.budget).run(program, plan_passes(strict, program))


def test_dump_and_diff(tmp_path):
    _, program = captured("llama")
    passes = [registry.pass_class(n)() for n in ("raise_rms_norm",)]
    rewritten = PassManager(Context(CPU), dump=tmp_path).run(program, passes)
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["000_capture.txt", "001_raise_rms_norm.txt"]
    difference = pass_diff(program, rewritten)
    assert "+%rms_norm_default = rms_norm(" in difference
    assert "-%rsqrt = rsqrt(" in difference


def test_bisect_names_the_rewrite(monkeypatch):
    _, program = captured("llama")
    recipe = Recipe(passes=[Wrong()])
    culprit = bisect(program, recipe, CPU, kl_test(program, 1e-7))
    assert culprit is not None
    assert culprit.pass_name == "wrong"
    assert "modeling_llama" in culprit.divergence


def test_bisect_has_nothing_to_do_when_all_is_well():
    _, program = captured("llama")
    assert bisect(program, Recipe.load("none"), CPU, kl_test(program, 1e-3)) is None


def test_bisect_refuses_a_bad_start():
    _, program = captured("llama")
    with pytest.raises(GraphwrightError, match="captured program fails the test"):
        bisect(program, Recipe.load("none"), CPU, lambda _program: False)
