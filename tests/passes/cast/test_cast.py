"""Casting weights: what changes dtype, what keeps it, and how near the model's own narrow form the result is."""

import copy

import pytest
import torch
from families.cache import captured
from families.configs import example_inputs

import graphwright
from graphwright.errors import RecipeError
from graphwright.feeding import logits_of
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import attention, rope
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target


def cast(name: str, dtype: str, *more: str) -> Program:
    _model, program = captured(name)
    recipe = Recipe.load({"passes": [{"cast": {"dtype": dtype}}, *more]})
    return graphwright.rewrite(program, recipe, Target.parse("cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_it_is_as_near_to_float32_as_the_model_is_in_this_dtype(name: str, dtype: str) -> None:
    model, _program = captured(name)
    inputs = example_inputs(name, batch=2, length=9)
    program = cast(name, dtype)
    with torch.no_grad():
        exact = model(**inputs)[0]
        narrow = copy.deepcopy(model).to(getattr(torch, dtype))(**inputs)[0].float()
    noise = (narrow - exact).square().mean().sqrt()
    assert (program(**inputs)[0].float() - exact).square().mean().sqrt() < 2 * noise + 1e-3


def test_positions_keep_float32() -> None:
    program = cast("llama", "bfloat16")
    for node in program.calls(rope.target):
        assert program.weight(argument(node, "inv_freq")).dtype == torch.float32
    others = {str(w.dtype) for name, w in program.weights().items() if "inv_freq" not in name}
    assert others == {"torch.bfloat16"}


def test_slopes_keep_float32() -> None:
    program = cast("bloom", "bfloat16")
    for node in program.calls(attention.target):
        assert program.weight(argument(node, "alibi_slopes")).dtype == torch.float32


@pytest.mark.parametrize("order", [("static_cache",), ("merge_linear", "static_cache", "select_logits")])
def test_caches_have_the_dtype_wherever_the_recipe_casts(order: tuple[str, ...]) -> None:
    _model, program = captured("llama")
    ids = torch.randint(0, 90, (2, 7))
    for passes in ([*order, {"cast": {"dtype": "bfloat16"}}], [{"cast": {"dtype": "bfloat16"}}, *order]):
        rewritten = graphwright.rewrite(program, Recipe.load({"passes": passes}), Target.parse("cpu"))
        assert {spec.dtype for spec in rewritten.contract.state} == {torch.bfloat16}
        assert relative_error(logits_of(rewritten, ids).float(), logits_of(program, ids)) < 0.5


def test_nothing_is_cast_to_the_dtype_it_has() -> None:
    program = cast("llama", "float32")
    assert program.history[-1].sites == 0


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RecipeError, match="dtype"):
        Recipe.load({"passes": [{"cast": {"dtype": "int8"}}]})
