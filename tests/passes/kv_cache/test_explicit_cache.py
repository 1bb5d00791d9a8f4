"""Caches as inputs and outputs: a program fed in chunks says what its cache-free program says."""

import pytest
import torch
from families.cache import captured
from families.configs import VOCAB_SIZE

from graphwright.errors import PassError, RecipeError
from graphwright.feeding import logits_of
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.explicit_cache import in_chunks
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target


def rewritten(name: str, *passes: object) -> tuple[Program, Program]:
    _, program = captured(name)
    recipe = Recipe.load({"passes": [*passes, "explicit_cache"]})
    return program, PassManager(Context(Target.parse("cpu")), verify=False).run(program, plan_passes(recipe, program))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bloom", "opt", "deepseek_v3"])
def test_padding_between_prompt_and_continuation_is_not_seen(name: str) -> None:
    before, after = rewritten(name)
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
    # The second prompt is shorter than the first: its padding lies between it and the tokens that follow.
    mask = torch.ones_like(ids)
    mask[1, 3:6] = 0
    found = in_chunks(after, ids, mask, (6, 8, 9))
    kept = ids[1][mask[1].bool()][None]
    assert relative_error(found[:1], logits_of(before, ids[:1])) < 1e-4
    assert relative_error(found[1:][:, mask[1].bool()], logits_of(before, kept)) < 1e-4


def test_one_length_of_past_and_presence_for_all_layers() -> None:
    _, after = rewritten("gemma2")
    shapes = {spec.name: spec.shape for spec in after.contract.inputs}
    assert shapes["past_key_0"] == ("batch", 2, "past", 16)
    assert shapes["key_mask"] == ("batch", "total")
    assert after.contract.outputs[:3] == ("logits", "present_key_0", "present_value_0")
    assert "attention_mask" not in shapes


def test_models_without_position_embeddings_take_no_positions() -> None:
    _, after = rewritten("bloom")
    assert "positions" not in after.contract.names


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_are_not_causal_are_refused(name: str) -> None:
    with pytest.raises(PassError, match=r"not (a )?causal"):
        rewritten(name)


def test_only_one_kind_of_cache() -> None:
    with pytest.raises(RecipeError, match="explicit_cache excludes kv_cache"):
        rewritten("llama", "static_cache")
