"""Latent attention: exact, found from the graph, one latent per token in the cache; composes; leaves others alone."""

import pytest
import torch
from families.cache import captured
from passes.kv_cache.caching import greedy, prompts, rewritten

from graphwright.feeding import logits_in_chunks
from graphwright.numerics import relative_error


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_greedy_tokens_are_those_of_the_model_and_the_cache_holds_latents(name):
    made = rewritten(name, "latent_attention", "static_cache", "select_logits", verify=True)
    records = {record.name: record for record in made.history}
    assert records["latent_attention"].sites == 3
    assert records["latent_attention"].error < 1e-4
    rank, rope_dim = 16, 8
    assert [spec.shape for spec in made.contract.state] == [("batch", 1, "capacity", rank + rope_dim)] * 3
    asked = prompts(5, 1, 11)
    found = greedy(made, asked, 8)
    model, _ = captured(name)
    for prompt, tokens in zip(asked, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_it_composes_with_int8_and_pages():
    layouts = ("quantized_cache", {"paged_cache": {"block_size": 4}})
    made = rewritten("deepseek_v3", "latent_attention", "static_cache", *layouts)
    dtypes = {spec.name: spec.dtype for spec in made.contract.state}
    assert dtypes == {
        f"key_pool_{i}_{part}": dtype
        for i in range(3)
        for part, dtype in (("codes", torch.int8), ("scale", torch.float32))
    }
    ids = torch.tensor(prompts(9, 9))
    found = logits_in_chunks(made, ids, None, [4, 8, 9])
    rounded = rewritten("deepseek_v3", "latent_attention", "static_cache", "quantized_cache")
    assert relative_error(found, logits_in_chunks(rounded, ids, None, [9])) < 1e-4


GOLDEN = """\
= matmul(%18, model.layers.0.self_attn.kv_b_proj_keys) : float32[batch, 4, sequence, 16]
"""


def test_queries_are_multiplied_where_keys_were():
    text = rewritten("deepseek_v3", "latent_attention").text()
    assert GOLDEN in text
    assert "kv_b_proj.weight" not in text


def test_other_attention_is_left_alone_and_the_reason_is_given():
    made = rewritten("llama", "latent_attention", "static_cache")
    record = next(record for record in made.history if record.name == "latent_attention")
    assert record.sites == 0
    assert record.notes["near_misses"][0].startswith("queries and keys are not two parts each")
    plain = rewritten("llama", "static_cache")
    ids = torch.tensor(prompts(6))
    assert relative_error(*(logits_in_chunks(p, ids, None, [6]) for p in (made, plain))) == 0
