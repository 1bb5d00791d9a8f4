"""Mixtures of experts the whole way: compiled for the CPU, saved, loaded, and saying what transformers says."""

import pytest
import torch
from families.cache import captured
from families.configs import VOCAB_SIZE

import graphwright

PASSES = ["merge_linear", "static_cache", "select_logits", "experts"]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
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


def test_a_quantized_artifact_says_what_its_program_says(tmp_path):
    quantized = {"rtn": {"bits": 4, "group_size": 16, "head_bits": 8}}
    compiled = graphwright.compile(captured("qwen3_moe")[1], {"passes": [*PASSES, quantized]}, verify=False)
    compiled.save(tmp_path / "out")
    loaded = graphwright.load(tmp_path / "out")
    assert loaded.backend == "tvm"
    prompt = torch.randint(3, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(6))
    contract = compiled.program.contract
    inputs = {
        "input_ids": prompt, "positions": torch.arange(9)[None], "key_positions": torch.arange(9),
        "logit_index": torch.arange(9)[None], **contract.allocate({"batch": 1, "capacity": 10}),
    }  # fmt: skip
    states = contract.allocate({"batch": 1, "capacity": 10})
    expected = compiled.program(**inputs)[0]
    found = loaded.executable({**inputs, **states})[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-5
