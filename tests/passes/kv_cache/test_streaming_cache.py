"""StreamingLLM caches: the formula, flat state, texts beyond the model's context, what has no positions in a cache."""

import pydantic
import pytest
import torch
from passes.kv_cache.caching import CPU, greedy, prompts, rewritten

from graphwright.errors import GenerationError, PassError
from graphwright.feeding import logits_in_chunks
from graphwright.numerics import relative_error
from graphwright.ops import kv_cache_update, rope, streaming_attention, streaming_slots
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.streaming_cache import StreamingCache

INV_FREQ = 100.0 ** -(torch.arange(0, 8, 2) / 8)


def plain(query, key, value, sinks: int, window: int, scale: float) -> torch.Tensor:
    """One head over [n, D]: each token over the first `sinks` and the last `window`, with positions 0, 1, 2 …"""
    outputs = []
    for i in range(len(query)):
        seen = [j for j in range(i + 1) if j < sinks or i - j < window]
        places = torch.arange(len(seen))[None]
        keys = rope(key[seen][None, None], places, INV_FREQ)[0, 0]
        turned = rope(query[i][None, None, None], places[:, -1:], INV_FREQ)[0, 0, 0]
        outputs.append((keys @ turned * scale).softmax(0) @ value[seen])
    return torch.stack(outputs)


@pytest.mark.parametrize(("sinks", "window"), [(2, 5), (0, 3), (4, 1)])
@pytest.mark.parametrize("chunks", [(1,) * 23, (23,), (3, 9, 1, 10)])
def test_every_token_sees_sinks_and_window_as_one_text(sinks, window, chunks):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 23, 8) for h in (4, 2, 2))
    caches = [torch.zeros(2, 2, sinks + window + 1, 8) for _ in range(2)]
    parts, start = [], 0
    for size in chunks:
        new = [x[:, :, start : start + size] for x in (query, key, value)]
        at = torch.arange(start, start + size).expand(2, -1)
        parts.append(streaming_attention(new[0], *caches, *new[1:], at, INV_FREQ, None, 0.4, sinks, window))
        for cache, fresh in zip(caches, new[1:], strict=True):
            kv_cache_update(cache, fresh, streaming_slots(at, sinks, window))
        start += size
    found = torch.cat(parts, 2)
    for head in range(4):
        expected = plain(query[1, head], key[1, head // 2], value[1, head // 2], sinks, window, 0.4)
        assert relative_error(found[1, head], expected) < 1e-4


def test_places_far_into_a_text_lose_no_precision():
    """Only distances count, so a million tokens later everything is the same."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, h, 4, 8) for h in (2, 1, 1))
    caches = [torch.randn(1, 1, 8, 8) for _ in range(2)]
    results = []
    for start in (1005, 1_000_005):  # the ring of 5 is at the same slot
        at = torch.arange(start, start + 4)[None]
        results.append(streaming_attention(query, *caches, key, value, at, INV_FREQ, None, 0.4, 2, 5))
    assert torch.equal(*results)


def program(name="llama", **options):
    return rewritten(name, "static_cache", {"streaming_cache": {"sinks": 2, "window": 8, **options}}, "select_logits")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_until_it_is_full_nothing_changes(name):
    asked = prompts(5, 1, 9)
    static = rewritten(name, "static_cache")
    assert greedy(program(name, window=30), asked, 12) == greedy(static, asked, 12)
    assert greedy(program(name), asked, 12) != greedy(static, asked, 12)


def test_any_chunking_is_the_same_and_so_is_padding():
    made = rewritten("llama", "static_cache", {"streaming_cache": {"sinks": 2, "window": 8}})
    ids = torch.tensor(prompts(40, 40))
    whole = logits_in_chunks(made, ids, None, [40])
    for ends in ([3, 4, 20, 40], range(1, 41)):
        assert relative_error(logits_in_chunks(made, ids, None, list(ends)), whole) < 1e-3
    asked = prompts(13, 2, 30)
    assert greedy(made, asked, 10) == [greedy(made, [prompt], 10)[0] for prompt in asked]


def test_texts_and_prompts_longer_than_the_context_and_flat_state():
    made = program()
    longest = made.metadata.context_length
    (prompt,) = prompts(2 * longest + 7)
    (tokens,) = greedy(made, [prompt], 5)
    assert len(tokens) == 5
    # What is pushed out reaches the end only through what is held: two layers see two windows back.
    held = [*prompt[:2], *prompt[-60:]]
    assert greedy(made, [held], 1)[0][0] == greedy(made, [prompt], 1)[0][0]
    sizes = [sum(t.nbytes for t in made.contract.allocate({"batch": 1}).values())]
    assert sizes == [2 * 2 * 2 * 11 * 16 * 4]
    with pytest.raises(GenerationError, match=f"context of {longest}"):
        greedy(rewritten("llama", "static_cache"), [prompt], 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bloom", "not rotated by rope"), ("gpt2", "not rotated by rope")],
)
def test_models_without_positions_to_give_anew_are_refused(name, message):
    with pytest.raises(PassError, match=message):
        program(name)


def test_windows_that_make_no_sense_are_refused():
    with pytest.raises(pydantic.ValidationError, match="window"):
        StreamingCache(window=0)
    with pytest.raises(PassError, match="more than the model's context of 512"):
        StreamingCache(window=600).run(rewritten("llama", "static_cache"), Context(CPU))
