"""Continuous batching: the tokens of each request alone; preemption both ways; shared prefixes; capacity; waste."""

import pytest
from passes.kv_cache.caching import greedy, prompts, rewritten

from graphwright.engine.batching import Scheduler
from graphwright.errors import GenerationError, GraphwrightError
from graphwright.ops import sample_tokens

PAGED = ("static_cache", {"paged_cache": {"block_size": 4}}, "select_logits")
PAGED_INT8 = ("static_cache", "quantized_cache", {"paged_cache": {"block_size": 4}}, "select_logits")


def scheduler(program, **options) -> Scheduler:
    return Scheduler(lambda tensors: program(**tensors), program.contract, program.metadata, debug=True, **options)


def alone(program, asked, counts):
    return [greedy(program, [prompt], count)[0] for prompt, count in zip(asked, counts, strict=True)]


LENGTHS, COUNTS = (5, 1, 11, 4, 8, 3), (9, 4, 12, 1, 7, 10)


@pytest.mark.parametrize("passes", [PAGED, PAGED_INT8], ids=["float", "int8"])
def test_requests_that_come_and_go_get_the_tokens_they_get_alone(passes):
    asked = prompts(*LENGTHS)
    batch = scheduler(rewritten("llama", *passes), blocks=40, max_batch=3)
    for number, (prompt, count) in enumerate(zip(asked, COUNTS, strict=True)):
        assert batch.submit(prompt, count, eos_token_ids=()) == number
        batch.step()
    found = batch.run()
    static = rewritten("llama", *(p for p in passes if not isinstance(p, dict)))
    assert found == alone(static, asked, COUNTS)
    assert batch.pool.free == batch.pool.total
    assert batch.statistics.tokens == sum(COUNTS)
    assert batch.statistics.preempted == 0


def test_tokens_are_chosen_where_logits_are_made():
    program, asked = rewritten("llama", *PAGED), prompts(3, 7)

    class Resident:
        def resident(self, tensors):
            return program(**tensors)

        def sample(self, logits, uniform, *options):
            return sample_tokens.reference(logits, uniform, *options)

    batch = Scheduler(Resident(), program.contract, program.metadata, blocks=9)
    for prompt in asked:
        batch.submit(prompt, 4, eos_token_ids=())
    assert batch.run() == alone(rewritten("llama", "static_cache", "select_logits"), asked, (4, 4))


@pytest.mark.parametrize(
    ("preempt", "passes"),
    [("recompute", PAGED), ("swap", PAGED), ("swap", PAGED_INT8)],
    ids=["recompute", "swap", "int8"],
)
def test_a_full_cache_preempts_and_resumes_with_equal_tokens(preempt, passes):
    asked = prompts(*LENGTHS, seed=2)
    batch = scheduler(rewritten("llama", *passes), blocks=8, max_batch=4, preempt=preempt)
    for prompt, count in zip(asked, COUNTS, strict=True):
        batch.submit(prompt, count, eos_token_ids=())
    static = rewritten("llama", *(p for p in passes if not isinstance(p, dict)))
    assert batch.run() == alone(static, asked, COUNTS)
    assert batch.statistics.preempted > 0
    assert batch.pool.free == batch.pool.total


def test_a_common_beginning_is_stored_once_and_copied_when_written():
    (common,) = prompts(8)
    asked = [[*common, 7], [*common, 9, 11], common, list(common)]
    counts = (6, 6, 6, 6)
    found = {}
    for share in (True, False):
        batch = scheduler(rewritten("llama", *PAGED), blocks=60, share=share)
        for prompt, count in zip(asked, counts, strict=True):
            batch.submit(prompt, count, eos_token_ids=())
        found[share] = batch.run()
        # Two blocks for each of the three that came later; the whole prompt's last block is written, and copied.
        assert (batch.pool.shared, batch.pool.copied) == ((6, 2) if share else (0, 0))
    assert found[True] == found[False] == alone(rewritten("llama", "static_cache"), asked, counts)


def test_an_end_token_ends_a_request():
    (prompt,) = prompts(5)
    program = rewritten("llama", *PAGED)
    (expected,) = greedy(program, [prompt], 6)
    batch = scheduler(program, blocks=20)
    batch.submit(prompt, 6, eos_token_ids=[expected[2]])
    assert batch.run() == [expected[: expected.index(expected[2]) + 1]]


def test_a_request_that_never_fits_names_the_capacity():
    batch = scheduler(rewritten("llama", *PAGED), blocks=4)
    with pytest.raises(GenerationError, match=r"come to 13 tokens .* the pool holds 12: 3 blocks of 4"):
        batch.submit(prompts(4)[0], 10)
    assert not batch.busy


def test_a_spoiled_table_is_found_before_it_is_used():
    batch = scheduler(rewritten("llama", *PAGED), blocks=20)
    for prompt in prompts(5, 6):
        batch.submit(prompt, 9, eos_token_ids=())
    batch.step()
    one, other = batch._running
    one.pages.blocks[0] = other.pages.blocks[0]
    with pytest.raises(GraphwrightError, match="page table is corrupt"):
        batch.step()


def test_waste_is_below_four_percent_where_texts_are_long():
    """Half of a block of 16 for each request of some 250 tokens."""
    program = rewritten("llama", "static_cache", "paged_cache", "select_logits")
    batch = scheduler(program, blocks=160, max_batch=8)
    for prompt in prompts(*range(200, 300, 13), seed=5):
        batch.submit(prompt, 12, eos_token_ids=())
    batch.run()
    assert 0 < batch.statistics.mean_waste < 0.04


def test_programs_without_pages_are_refused():
    for passes in (("static_cache",), ("static_cache", "quantized_cache")):
        with pytest.raises(GenerationError, match="outside of pages"):
            scheduler(rewritten("llama", *passes), blocks=8)
