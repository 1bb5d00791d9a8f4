"""Scaled rotary embeddings against transformers' own, and what is refused."""

import copy
import math

import pytest
import torch
from families.cache import captured
from families.configs import VOCAB_SIZE, build
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright
from graphwright.capture import capture
from graphwright.errors import PassError, RecipeError
from graphwright.manager import PassManager, plan_passes
from graphwright.ops import rope
from graphwright.pass_ import Context
from graphwright.passes.rope._frequencies import rotary_base
from graphwright.passes.rope.ntk_aware import NtkAware
from graphwright.passes.rope.position_interpolation import PositionInterpolation
from graphwright.passes.rope.yarn import Yarn
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

NAMES = ("position_interpolation", "ntk_aware", "yarn")


def run(program: Program, *passes) -> Program:
    recipe = Recipe.load({"passes": [*passes]})
    return PassManager(Context(Target.parse("cpu"))).run(program, plan_passes(recipe, program))


def twin(name: str, **parameters) -> torch.nn.Module:
    """The same weights in a model whose own configuration scales its rotary embedding."""
    model = build(name)
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, **parameters}
    if "original_max_position_embeddings" in parameters:
        config.original_max_position_embeddings = parameters["original_max_position_embeddings"]
    config.max_position_embeddings = int(config.max_position_embeddings * parameters.get("factor", 1))
    made = type(model)(config).eval()
    made.load_state_dict(model.state_dict())
    return made


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_interpolation_and_yarn_are_transformers_own(name, factor):
    _, program = captured(name)
    trained = program.metadata.context_length
    for one, kind in (("position_interpolation", "linear"), ("yarn", "yarn")):
        scaled = run(program, {one: {"factor": factor}})
        model = twin(name, rope_type=kind, factor=factor, original_max_position_embeddings=trained)
        ids = tokens(int(trained * factor) - 3)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        (found,) = scaled(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert float((found - expected).norm() / expected.norm()) < 1e-4
        assert scaled.metadata.context_length == scaled.contract.dim("sequence").max == int(trained * factor)


def test_ntk_is_transformers_dynamic_form_at_the_longest_text():
    _, program = captured("llama")
    trained, factor = program.metadata.context_length, 3
    scaled = run(program, {"ntk_aware": {"factor": factor}})
    ids = tokens(trained * factor)
    with torch.no_grad():
        expected = twin("llama", rope_type="dynamic", factor=1.0)(input_ids=ids, use_cache=False).logits
    (found,) = scaled(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@settings(max_examples=30, deadline=None)
@given(half=st.integers(2, 64), factor=st.floats(1, 64), base=st.sampled_from([500.0, 1e4, 5e5]))
def test_limits_of_the_methods(half, factor, base):
    inv_freq = base ** -(torch.arange(half) / half)
    assert rotary_base(inv_freq) == pytest.approx(base, rel=1e-3)
    linear, ntk, yarn = (one(factor=factor).scaled(inv_freq, 2048) for one in (PositionInterpolation, NtkAware, Yarn))
    torch.testing.assert_close(linear * factor, inv_freq)
    torch.testing.assert_close(ntk[[0, -1]], inv_freq[[0, -1]] / torch.tensor([1.0, factor]))
    for method in (ntk, yarn):
        assert bool(((method >= linear * (1 - 1e-5)) & (method <= inv_freq * (1 + 1e-5))).all())
    assert Yarn(factor=factor).temperature == pytest.approx(0.1 * math.log(factor) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_of_one_changes_nothing(name):
    _, program = captured("llama")
    scaled = run(program, {name: {"factor": 1}})
    ids = tokens(9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(scaled(**inputs)[0], run(program)(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_frequencies_are_shared_and_attention_with_a_window_keeps_its_own():
    plain, scaled = run(captured("gemma3")[1]), run(captured("gemma3")[1], {"position_interpolation": {"factor": 2}})
    kept, new = ([str(n.args[2].target) for n in p.calls(rope.target)] for p in (plain, scaled))
    changed = {(a, b) for a, b in zip(kept, new, strict=True) if a != b}
    assert changed
    assert {b for _, b in changed} == {f"{a}_scaled" for a, _ in changed}
    assert any(a == b for a, b in zip(kept, new, strict=True))
    assert len(set(new)) == 2


def test_caches_follow_and_generation_goes_beyond_the_trained_context():
    model = build("llama")
    trained = capture(model).metadata.context_length
    passes = [{"yarn": {"factor": 2}}, "static_cache", "select_logits"]
    compiled = graphwright.compile(model, {"passes": passes}, verify=False)
    assert compiled.program.contract.dim("capacity").max == 2 * trained + 1
    prompt = tokens(trained - 4)[:1].tolist()
    found = compiled.generate(prompt, max_new_tokens=12, eos_token_ids=()).tokens
    made = twin("llama", rope_type="yarn", factor=2.0, original_max_position_embeddings=trained)
    with torch.no_grad():
        expected = made.generate(input_ids=torch.tensor(prompt), max_new_tokens=12, do_sample=False)
    assert found == expected[:, len(prompt[0]) :].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.5, 0, -2, math.nan, math.inf])
def test_factors_below_one_are_refused(name, factor):
    with pytest.raises(RecipeError, match="factor"):
        Recipe.load({"passes": [{name: {"factor": factor}}]})


def test_what_is_refused():
    with pytest.raises(RecipeError, match="beta_slow is 40 and must be below beta_fast, 32"):
        Recipe.load({"passes": [{"yarn": {"factor": 2, "beta_slow": 40}}]})
    with pytest.raises(PassError, match="and the program has none"):
        run(captured("gpt2")[1], {"yarn": {"factor": 2}})
    cached = run(captured("llama")[1], "static_cache")
    with pytest.raises(PassError, match="comes before caches"):
        run(cached, {"yarn": {"factor": 2}})
    with pytest.raises(RecipeError, match="excludes scaled_rope, which comes from ntk_aware"):
        run(captured("llama")[1], {"yarn": {"factor": 2}}, {"ntk_aware": {"factor": 2}})
    scaled = capture(twin("llama", rope_type="yarn", factor=2.0, original_max_position_embeddings=512))
    with pytest.raises(PassError, match="is scaled already"):
        run(scaled, {"position_interpolation": {"factor": 2}})
    with pytest.raises(PassError, match="not powers of one base"):
        rotary_base(torch.tensor([1.0, 0.5, 0.01]))
