"""Paged caches: equal to contiguous ones for any table, any chunking, and with int8; what has no pages."""

import pytest
import torch
from passes.kv_cache.caching import greedy, prompts, rewritten

from graphwright.errors import PassError
from graphwright.numerics import relative_error
from graphwright.ops import kv_cache_update, paged_read, paged_update


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17])
def test_any_table_reads_what_a_contiguous_cache_reads(length):
    generator = torch.Generator().manual_seed(length)
    table = torch.randperm(14, generator=generator)[:10].reshape(2, 5)
    table[0, -(-length // 4) :] = -1
    pool, cache = torch.full((15, 2, 4, 8), 7.0), torch.zeros(2, 2, 21, 8)
    new = torch.randn(2, 2, length, 8, generator=generator)
    slots = torch.arange(length).expand(2, -1).clone()
    slots[1] -= 1
    paged_update(pool, new, slots, table)
    kv_cache_update(cache, new, slots)
    found = paged_read(pool, table, length)
    for row in range(2):
        held = int(slots[row].max()) + 1
        assert torch.equal(found[row, :, :held], cache[row, :, :held])
    unused = sorted(set(range(14)) - set(table.flatten().tolist()))
    assert (pool[unused] == 7.0).all(), "nobody else's block is written"


@pytest.mark.parametrize("extra", [(), ("quantized_cache",)], ids=["float", "int8"])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_ragged_greedy_tokens_are_those_of_the_contiguous_cache(extra, block_size):
    made = rewritten("llama", "static_cache", *extra, {"paged_cache": {"block_size": block_size}}, "select_logits")
    asked = prompts(5, 1, 17)
    assert greedy(made, asked, 12) == greedy(rewritten("llama", "static_cache", *extra), asked, 12)


def test_the_pass_verifies_itself_and_rings_stay_in_rows():
    made = rewritten("gemma3", "static_cache", {"paged_cache": {"block_size": 4}}, verify=True)
    assert made.history[-1].error < 1e-6
    shapes = {spec.name: spec.shape[0] for spec in made.contract.state}
    assert shapes["key_cache_0"] == "batch"
    assert shapes["key_pool_2"] == "blocks"
    asked = prompts(9, 2)
    assert greedy(made, asked, 9) == greedy(rewritten("gemma3", "static_cache"), asked, 9)


def test_a_model_of_rings_only_has_no_pages():
    with pytest.raises(PassError, match="none has pages"):
        rewritten("mistral", "static_cache", "paged_cache")


def test_padding_goes_to_the_scratch_block():
    pool = torch.zeros(3, 1, 2, 4)
    paged_update(pool, torch.ones(1, 1, 2, 4), torch.tensor([[-1, 1]]), torch.tensor([[1]]))
    assert relative_error(pool[1, 0, 1], torch.ones(4)) == 0
    assert not pool[0].any()
    assert not pool[1, 0, 0].any()
