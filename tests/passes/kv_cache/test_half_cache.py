"""Caches in float16: half the state, what the formula says, any chunking, rings and latents, what is refused."""

import pytest
import torch
from passes.kv_cache.caching import greedy, prompts, rewritten

from graphwright.errors import RecipeError
from graphwright.feeding import logits_in_chunks
from graphwright.manager import plan_passes
from graphwright.numerics import relative_error
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.half_cache import HalfCache
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


def test_state_is_half_as_large():
    sizes = {"batch": 2, "capacity": 33}
    before, after = (
        rewritten("llama", "static_cache", *layout).contract.allocate(sizes) for layout in ((), ("half_cache",))
    )
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert 2 * sum(t.nbytes for t in after.values()) == sum(t.nbytes for t in before.values())


def test_the_graph_computes_what_the_formula_says():
    """Static caches whose entries were rounded by hand as they were written."""
    program, plain = rewritten("llama", "static_cache", "half_cache"), rewritten("llama", "static_cache")
    for node in plain.calls(torch.ops.graphwright.kv_cache_update.default):
        with plain.graph.inserting_before(node):
            made = plain.graph.call_function(lambda x: x.half().float(), (node.args[1],))
        node.args = (node.args[0], made, node.args[2])
    plain.module.recompile()
    ids = torch.tensor(prompts(9, 9))
    ends = [4, 5, 9]
    assert relative_error(logits_in_chunks(program, ids, None, ends), logits_in_chunks(plain, ids, None, ends)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_it_stays_close_and_does_not_depend_on_chunks(name):
    program = rewritten(name, "static_cache", "half_cache")
    ids = torch.tensor(prompts(13, 13))
    whole = logits_in_chunks(program, ids, None, [13])
    if name != "gemma3":  # what a ring's layer sees of its own chunk is not rounded yet
        for ends in ([1, 2, 7, 13], range(1, 14)):
            # A last bit that differs may round a key to the next half.
            assert relative_error(logits_in_chunks(program, ids, None, list(ends)), whole) < 1e-3
    exact = logits_in_chunks(rewritten(name, "static_cache"), ids, None, [13])
    stepped = logits_in_chunks(program, ids, None, list(range(1, 14)))
    error = float((stepped - exact).norm() / exact.norm())
    assert 1e-6 < error < 5e-3, "the tiny random models turn small differences into larger ones"


def test_ragged_prompts_generate_what_they_generate_alone():
    program = rewritten("qwen2", "static_cache", "half_cache")
    asked = prompts(5, 1, 11)
    assert greedy(program, asked, 6) == [greedy(program, [prompt], 6)[0] for prompt in asked]


def test_latents_and_pages():
    ids = torch.tensor(prompts(9, 9))
    latents = [rewritten("deepseek_v3", "latent_attention", "static_cache", *more) for more in ((), ("half_cache",))]
    found, expected = (logits_in_chunks(program, ids, None, [4, 9]) for program in latents)
    assert relative_error(found, expected) < 5e-2
    plain, paged = (rewritten("llama", "static_cache", "half_cache", *more) for more in ((), ("paged_cache",)))
    assert all(spec.dtype == torch.float16 for spec in paged.contract.state)
    found, expected = (logits_in_chunks(program, ids, None, [4, 5, 9]) for program in (paged, plain))
    assert torch.equal(found, expected)


def test_the_error_is_measured_and_reported():
    record = rewritten("llama", "static_cache", "half_cache", verify=True).history[-1]
    assert record.name == "half_cache"
    assert 0 < record.error < 0.05, "the largest one of any logit, which may be small itself"
    assert record.notes["kl"] < 1e-4
    assert record.notes["cache_bytes_per_token"] == [2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * 16 * 2]


def test_caches_that_are_no_wider_stay():
    halved = rewritten("llama", "static_cache", "half_cache")
    text = halved.text()
    result = HalfCache().run(halved, Context(CPU))
    assert not result.sites
    assert result.program.text() == text


@pytest.mark.parametrize("other", ["quantized_cache", "kivi_cache", "streaming_cache", "h2o_cache"])
def test_layouts_of_their_own_are_refused(other):
    program = rewritten("llama")
    with pytest.raises(RecipeError, match="excludes"):
        plan_passes(Recipe.load({"passes": ["static_cache", "half_cache", other]}), program)


GOLDEN = """\
%25 = kv_cache_update(%key_cache_0_float16, %24, %positions) : None
%26 = slice.Tensor(%key_cache_0_float16, 2, 0, %7) : float16[batch, 2, keys, 16]
%27 = to.dtype(%26, float32) : float32[batch, 2, keys, 16]
"""


def test_the_text_of_one_cache():
    assert GOLDEN in rewritten("llama", "static_cache", "half_cache").text()
