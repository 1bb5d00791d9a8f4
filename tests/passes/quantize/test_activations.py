"""Rounding of activations: codes, scales, sharing, and what it does to a program."""

import pytest
import torch
from families.cache import captured
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.capture import capture
from graphwright.errors import PassError, RecipeError
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


@given(rows=st.integers(1, 5), groups=st.integers(1, 3), width=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_error_is_within_half_a_step(rows, groups, width, seed):
    x = torch.randn(rows, groups * width, generator=torch.Generator().manual_seed(seed))
    for group_size in (0, width):
        step = x.unflatten(-1, (-1, group_size or x.shape[-1])).abs().amax(-1, keepdim=True) / 127
        error = (quantize_dequantize(x, None, "int8", group_size) - x).unflatten(-1, (-1, group_size or x.shape[-1]))
        assert (error.abs() <= step * 0.5 + 1e-6).all()


def test_rounding_twice_changes_nothing_and_zeros_stay_zeros():
    x = torch.randn(2, 3, 96)
    once = quantize_dequantize(x, None, "int8", 32)
    assert torch.allclose(quantize_dequantize(once, None, "int8", 32), once, rtol=1e-6)
    assert not quantize_dequantize(torch.zeros(1, 4), None, "int8", 0).any()


def test_a_static_scale_saturates():
    x = torch.tensor([[-100.0, 0.3, 0.26, 100.0]])
    assert quantize_dequantize(x, torch.tensor(0.5), "int8", 0).tolist() == [[-63.5, 0.5, 0.5, 63.5]]


def rounded(program, options):
    recipe = Recipe.load({"passes": [{"rtn": {"bits": 8, "group_size": 0}}, {"activations": options}]})
    return PassManager(Context(CPU)).run(program, plan_passes(recipe, program))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_layers_that_read_the_same_share_one_rounding(name):
    _, program = captured(name)
    after = rounded(program, {"head": False})
    linears = list(after.calls(quantized_linear.target))
    sources = [node.args[0] for node in linears if node.args[0].target is quantize_dequantize.target]
    assert len(sources) == len(linears) - 1, "all but the head"
    assert len(set(sources)) == len(list(after.calls(quantize_dequantize.target)))
    assert len(set(sources)) < len(sources) or name == "gpt2"


def test_the_error_is_that_of_the_rounding():
    torch.manual_seed(0)
    program = capture(torch.nn.Linear(64, 32), example_inputs=(torch.randn(3, 64),))
    before = rounded(program.clone(), {})
    (linear,) = before.calls(quantized_linear.target)
    inputs = before.contract.draw({})
    x = next(iter(inputs.values()))
    weight, scale, zero, bias = (n and before.weight(n) for n in linear.args[1:5])
    expected = quantized_linear(quantize_dequantize(x, None, "int8", 0), weight, scale, zero, bias, "int8", 64)
    assert torch.equal(before(**inputs)[0], expected)
    assert 0 < relative_error(expected, program(**inputs)[0]) < 0.02


def test_layers_may_keep_their_inputs():
    eight = {"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}
    program = captured("llama")[1]
    recipe = Recipe.load({"passes": [eight, {"activations": {"skip": ["down_proj", "lm_head"]}}]})
    after = PassManager(Context(CPU)).run(program, plan_passes(recipe, program))
    for node in after.calls(quantized_linear.target):
        kept = any(name in str(node.args[1]) for name in ("down_proj", "lm_head"))
        assert (node.args[0].target is quantize_dequantize.target) is not kept
    with pytest.raises(PassError, match="No layer's weight matches nothing"):
        PassManager(Context(CPU)).run(
            program, plan_passes(Recipe.load({"passes": [eight, {"activations": {"skip": ["nothing"]}}]}), program)
        )


def static(program, x, **options):
    """A linear layer whose input is rounded with a static scale, calibrated on rows x."""
    recipe = Recipe.load(
        {"passes": [{"rtn": {"bits": 8, "group_size": 0}}, {"activations": {"static": True, **options}}]}
    )
    inputs = [dict.fromkeys(program.contract.names, x)]
    return PassManager(Context(CPU, calibration=inputs)).run(program, plan_passes(recipe, program))


def scale_of(program):
    (rounding,) = program.calls(quantize_dequantize.target)
    return None if rounding.args[1] is None else program.weight(rounding.args[1])


@pytest.fixture(scope="module")
def one_layer():
    return capture(torch.nn.Linear(64, 32), example_inputs=(torch.randn(3, 64),))


def test_minmax_reaches_the_largest_magnitude_and_percentile_clips_a_part(one_layer):
    x = torch.linspace(-1, 1, 64 * 100).reshape(100, 64)[torch.randperm(100)]
    x[50, 7] = -40.0
    assert float(scale_of(static(one_layer.clone(), x, observer="minmax"))) == pytest.approx(40 / 127)
    clipped = static(one_layer.clone(), x, observer="percentile", percentile=90)
    assert float(scale_of(clipped)) == pytest.approx(0.9 / 127, rel=0.02)


def test_mse_is_never_worse_than_minmax_and_finds_what_a_search_over_the_values_finds(one_layer):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64)

    def loss(scale):
        return float((quantize_dequantize(x, torch.as_tensor(scale), "int4", 0) - x).square().sum())

    for options in ({"format": "int4"}, {"format": "int4", "observer": "mse"}):
        found = loss(scale_of(static(one_layer.clone(), x, **options)))
        best = min(loss(x.abs().max() / 7 * part) for part in torch.linspace(0.1, 1, 200))
        assert found <= 1.01 * best
        assert found < 0.9 * loss(x.abs().max() / 7)


def test_inputs_whose_tokens_differ_too_much_keep_scales_per_token_and_are_named(one_layer):
    x = torch.ones(20, 64)
    x[3] = 100.0
    kept = static(one_layer.clone(), x, dynamic_above=50)
    assert scale_of(kept) is None
    assert len(kept.history[-1].notes["scales per token"]) == 1
    assert scale_of(static(one_layer.clone(), x, dynamic_above=200)) is not None


def test_zeros_have_a_scale(one_layer):
    for observer in ("minmax", "percentile", "mse"):
        after = static(one_layer.clone(), torch.zeros(4, 64), observer=observer)
        assert float(scale_of(after)) > 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"observer": "mse"}, "observer would have no effect"),
        ({"static": True, "percentile": 99}, "the observer is mse"),
        ({"static": True, "observer": "percentile", "percentile": 10}, "greater than 50"),
        ({"static": True, "observer": "entropy"}, "minmax"),
        ({"dynamic_above": 20}, "dynamic_above would have no effect"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, problem):
    with pytest.raises(RecipeError, match=problem):
        Recipe.load({"passes": [{"activations": options}]})
