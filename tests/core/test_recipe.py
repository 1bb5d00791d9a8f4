"""Recipes: presets, YAML, round trips, and every way to get one wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright import registry
from graphwright.errors import BackendError, RecipeError, TargetError
from graphwright.manager import plan_passes
from graphwright.recipe import Recipe, presets
from graphwright.target import Target, known_targets


@pytest.mark.parametrize("name", presets())
def test_presets_load_plan_and_round_trip(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert plan_passes(recipe)
    assert Recipe.load(recipe.to_data()) == recipe


@given(bits=st.sampled_from([4, 8]), group=st.integers(0, 100).map(lambda n: 2 * n), symmetric=st.booleans())
def test_options_round_trip(bits, group, symmetric):
    recipe = Recipe.load({"passes": [{"rtn": {"bits": bits, "group_size": group, "symmetric": symmetric}}]})
    assert Recipe.load(recipe.to_data()) == recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"passes": ["static_cach"]}, "Unknown pass 'static_cach'. Did you mean static_cache"),
        ({"passes": [{"rtn": {"bit": 4}}]}, "Unknown option 'bit'.*Did you mean bits"),
        ({"passes": [{"rtn": {"bits": 5}}]}, "Option bits is 5"),
        (
            {"passes": [{"rtn": {"group_size": 33}}]},
            "do not go together: the group size of int4 is a multiple of 2.*pass rtn",
        ),
        ({"passes": [{"rtn": {"group_size": -2}}]}, "greater than or equal to -1"),
        ({"passes": [{"gptq": {"bits": 3, "group_size": 12}}]}, "the group size of int3 is a multiple of 8"),
        ({"passes": [{"nf4": {"layers": {"q": {"symmetric": False}}}}]}, "nf4 has no zero points"),
        ({"passes": [{"rtn": {"layers": {"(": {}}}}]}, "is not a regular expression"),
        ({"passes": [{"cast": {"dtype": "float8"}}]}, "Option dtype is 'float8'"),
        ({"passes": [{"rtn": 4}]}, "options of pass rtn are a mapping"),
        ({"passes": [{"rtn": {}, "cast": {}}]}, "one name with its options"),
        ({"passes": "rtn"}, "are a list"),
        ({"pases": []}, "Unknown option 'pases'.*Did you mean passes"),
        ({"budget": {"kll": 1}}, "Unknown option 'budget.kll'.*Did you mean kl"),
        ({"budget": {"kl": -1}}, "greater than 0"),
    ],
)
def test_wrong_recipes_are_explained(data, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(data)


def test_unknown_preset():
    with pytest.raises(RecipeError, match="Unknown recipe 'int9'. Did you mean int"):
        Recipe.load("int9")


def test_yaml_files(tmp_path):
    good = tmp_path / "mine.yaml"
    good.write_text("passes:\n  - rtn: {bits: 8}\n")
    assert Recipe.load(good).name == "mine"
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("passes: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.load(bad)
    bad.write_text("- a\n")
    with pytest.raises(RecipeError, match="holds no mapping"):
        Recipe.load(bad)


def test_unknown_target_and_backend():
    with pytest.raises(TargetError, match="Unknown target 'cuda:sm_91'. Did you mean cuda:sm_9"):
        Target.parse("cuda:sm_91")
    with pytest.raises(BackendError, match="Unknown backend 'inducter'. Did you mean inductor"):
        registry.backend("inducter")
    assert all(Target.parse(name).name == name for name in known_targets())


def test_every_pass_file_is_a_documented_pass():
    for name, cls in registry.all_passes().items():
        assert cls.name == name
        assert cls.kind in ("exact", "approximate", "structural")
        assert cls.__doc__
        module = __import__(cls.__module__, fromlist=["x"])
        assert module.__doc__
        assert len(module.__doc__) > 100
