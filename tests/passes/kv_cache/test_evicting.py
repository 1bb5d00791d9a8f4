"""H2O and Scissorhands: a plain loop picks the same tokens, token by token and in chunks; budgets; models; refusals."""

import pydantic
import pytest
import torch
from passes.kv_cache.caching import CPU, greedy, prompts, rewritten

from graphwright.errors import PassError
from graphwright.numerics import relative_error
from graphwright.ops import attention, attention_with_mass, evicting_update
from graphwright.pass_ import Context
from graphwright.passes.kv_cache.h2o_cache import H2oCache
from graphwright.passes.kv_cache.scissorhands_cache import ScissorhandsCache

TOKENS, WIDTH, SCALE = 30, 8, 0.5


class Plain:
    """One key-value head of a cache as the papers describe it: a list of places with scores."""

    def __init__(self, budget: int, recent: int, drop: int, history: int) -> None:
        self.budget, self.recent, self.drop, self.history = budget, recent, drop, history
        self.score: dict[int, float] = {}

    def take(self, query: torch.Tensor, key: torch.Tensor, start: int, end: int) -> None:
        """New tokens start … end - 1; `query` [heads, n, D] and `key` [n, D] of the whole text."""
        held = [*self.score, *range(start, end)]
        gained = dict.fromkeys(held, 0.0)
        for head in query:
            for i in range(start, end):
                seen = [j for j in held if j <= i]
                weights = (key[seen] @ head[i] * SCALE).softmax(0)
                for j, weight in zip(seen, weights.tolist(), strict=True):
                    if self.history:
                        gained[j] += (weight < 1 / len(seen)) * (i >= end - self.history)
                    else:
                        gained[j] += weight
        counts = not self.history or len(held) > self.budget - self.history
        total = {j: self.score.get(j, 0.0) + counts * gained[j] for j in held}
        if len(held) > self.budget:
            sign = 1 if self.history else -1
            merit = sorted(held, key=lambda j: (j < end - self.recent, sign * total[j], -j))
            kept = merit[: self.budget - self.drop]
            total = {j: 0.0 if self.history else total[j] for j in held if j in kept}
        self.score = total


@pytest.mark.parametrize(("recent", "drop", "history"), [(4, 0, 0), (1, 0, 0), (3, 4, 6), (2, 5, 400)], ids=str)
@pytest.mark.parametrize("chunks", [(1,) * TOKENS, (17,) + (1,) * 13, (5, 9, 16), (TOKENS,)], ids=len)
def test_a_plain_loop_keeps_the_same_tokens_with_the_same_scores(recent, drop, history, chunks):
    torch.manual_seed(3)
    budget = 10
    query, key, value = (torch.randn(2, h, TOKENS, WIDTH) for h in (6, 2, 2))
    state = [torch.zeros(2, 2, budget + 1, WIDTH) for _ in range(2)]
    state += [torch.zeros(2, 2, budget, dtype=torch.int64), torch.zeros(2, 2, budget)]
    plain = {(b, h): Plain(budget, recent, drop, history) for b in range(2) for h in range(2)}
    start = 0
    for size in chunks:
        end = start + size
        at = torch.arange(start, end).expand(2, -1)
        new = [x[:, :, start:end] for x in (query, key, value)]
        places = torch.cat([state[2] - 1, at[:, None].expand(-1, 2, -1)], 2)
        keys, values = (torch.cat([s[:, :, :budget], n], 2) for s, n in zip(state[:2], new[1:], strict=True))
        _, mass = attention_with_mass(new[0], keys, values, at, places, None, None, SCALE, 0.0, bool(history), history)
        evicting_update(*state, *new[1:], at, mass, recent, drop, history, not history)
        for (b, h), one in plain.items():
            one.take(query[b, 3 * h : 3 * h + 3], key[b, h], start, end)
            found = {int(p) - 1: float(s) for p, s in zip(state[2][b, h], state[3][b, h], strict=True) if p}
            assert found.keys() == one.score.keys(), end
            assert found == pytest.approx(one.score, abs=1e-4)
            for slot, place in enumerate((state[2][b, h] - 1).tolist()):
                if place >= 0:
                    assert torch.equal(state[0][b, h, slot], key[b, h, place])
                    assert torch.equal(state[1][b, h, slot], value[b, h, place])
        start = end


def test_planted_heavy_hitters_survive_and_the_newest_are_always_there():
    torch.manual_seed(0)
    hitters, budget = [3, 11], 8
    query, key, value = (torch.randn(1, 1, 60, WIDTH) for _ in range(3))
    query[..., 0] = 4
    key[..., 0] = 0
    key[:, :, hitters, 0] = 4
    state = [torch.zeros(1, 1, budget + 1, WIDTH) for _ in range(2)]
    state += [torch.zeros(1, 1, budget, dtype=torch.int64), torch.zeros(1, 1, budget)]
    for i in range(60):
        at, new = torch.tensor([[i]]), [x[:, :, i : i + 1] for x in (query, key, value)]
        places = torch.cat([state[2] - 1, at[:, None]], 2)
        keys, values = (torch.cat([s[:, :, :budget], n], 2) for s, n in zip(state[:2], new[1:], strict=True))
        _, mass = attention_with_mass(new[0], keys, values, at, places, None, None, SCALE)
        evicting_update(*state, *new[1:], at, mass, 4, 0, 0, True)
        held = set((state[2].flatten() - 1).tolist())
        assert set(range(max(0, i - 3), i + 1)) <= held
        assert len(held - {-1}) == min(i + 1, budget)
    assert set(hitters) <= held


def test_the_output_is_that_of_plain_attention():
    for sample in attention_with_mass.samples_of(torch.float32):
        query, key, value, query_at, key_at, slopes, sinks, scale, softcap, *_ = (*sample.args, 0.0)
        found, _ = attention_with_mass(*sample.args)
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            one = [x[:, h : h + 1] for x, h in ((query, head), (key, head // group), (value, head // group))]
            extras = [None if x is None else x[head : head + 1] for x in (slopes, sinks)]
            expected = attention(
                *one, query_at, key_at[:, head // group], None, *extras, scale, True, softcap=float(softcap)
            )
            assert relative_error(found[:, head : head + 1], expected) < 1e-5


H2O, SCISSORHANDS = {"h2o_cache": {"budget": 12}}, {"scissorhands_cache": {"budget": 12, "recent": 3, "history": 8}}


@pytest.mark.parametrize("which", [H2O, SCISSORHANDS], ids=["h2o", "scissorhands"])
def test_generation_past_the_budget_alone_and_in_a_ragged_batch(which):
    made = rewritten("llama", "static_cache", which, "select_logits")
    assert {spec.shape[2] for spec in made.contract.state} == {12, 13}
    asked = prompts(20, 1, 7)
    together = greedy(made, asked, 25)
    assert together == [greedy(made, [prompt], 25)[0] for prompt in asked]
    assert together != greedy(rewritten("llama", "static_cache"), asked, 25)


@pytest.mark.parametrize("name", ["bloom", "gpt_oss"])
def test_a_budget_as_long_as_the_text_changes_nothing(name):
    """Alibi, sinks, and rings beside."""
    made = rewritten(name, "static_cache", {"h2o_cache": {"budget": 40}})
    asked = prompts(9, 3)
    assert greedy(made, asked, 8) == greedy(rewritten(name, "static_cache"), asked, 8)


def test_the_error_is_measured_past_the_budget():
    record = rewritten("llama", "static_cache", H2O, verify=True).history[-1]
    assert record.error > 0.01
    assert record.notes["tokens"] == 12


def test_budgets_without_room_are_refused():
    static = rewritten("llama", "static_cache")
    with pytest.raises(PassError, match="A cache of 1 tokens that keeps the 0 newest"):
        H2oCache(budget=1.5).run(static.clone(), Context(CPU))
    with pytest.raises(
        PassError, match="A cache of 12 tokens that keeps the 10 newest and frees 6 at once has no room"
    ):
        ScissorhandsCache(budget=12).run(static.clone(), Context(CPU))
    with pytest.raises(pydantic.ValidationError):
        H2oCache(budget=0)
