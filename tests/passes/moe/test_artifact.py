"""Mixtures of experts the whole way: compiled for the CPU, saved, loaded, and saying what transformers says."""

import pytest
import torch
from families.cache import captured
from families.configs import VOCAB_SIZE

import graphwright
from graphwright.feeding import logits_of
from graphwright.manager import PassManager, plan_passes
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import experts, quantized_experts
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
PASSES = ["merge_linear", "static_cache", "select_logits", "experts"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_artifact_says_what_transformers_says(name, tmp_path):
    model, program = captured(name)
    graphwright.compile(program, {"passes": PASSES}, verify=False).save(tmp_path / "out")
    loaded = graphwright.load(tmp_path / "out")
    assert loaded.backend == "tvm"
    generator = torch.Generator().manual_seed(4)
    for length in (1, 7):
        prompt = torch.randint(3, VOCAB_SIZE, (1, length), generator=generator)
        with torch.no_grad():
            expected = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[:, length:]
        found = loaded.generate(prompt.tolist(), max_new_tokens=8, eos_token_ids=()).tokens
        assert found == expected.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantized_artifact_says_what_its_program_says(name, tmp_path):
    """The last layer has 8 bits, all others have 4."""
    model, program = captured(name)
    last = rf"layers\.{model.config.num_hidden_layers - 1}\."
    rounded = {"rtn": {"bits": 4, "group_size": 16, "layers": {last: {"format": "int8", "group_size": 0}}}}
    plan = plan_passes(Recipe.load({"passes": [*PASSES, rounded]}), program)
    quantized = PassManager(Context(Target.parse("cpu"))).run(program.clone(), plan)
    formats = {argument(node, "format") for node in quantized.calls(quantized_experts.target)}
    assert formats == {"int4", "int8"}
    assert not [*quantized.calls(experts.target)]
    graphwright.compile(quantized, {"passes": []}, verify=False).save(tmp_path / "out")
    loaded = graphwright.load(tmp_path / "out")
    assert loaded.backend == "tvm"
    prompt = torch.randint(3, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(6))
    assert relative_error(loaded.logits(prompt), logits_of(quantized, prompt)) < 1e-4
