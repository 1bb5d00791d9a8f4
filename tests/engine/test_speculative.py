"""Guessed tokens: what holds is kept, greedy text is the same, and sampled text has the same distribution."""

import pytest
import torch
from families.cache import captured
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.engine.generate import Generator
from graphwright.engine.sampling import Sampling, distribution, draw
from graphwright.engine.speculative import Draft, ModelDrafter, PromptLookup, accept
from graphwright.errors import GenerationError
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target

CACHED = ["static_cache", "select_logits"]


def generator(name: str, *passes) -> Generator:
    _, program = captured(name)
    recipe = Recipe.load({"passes": [*CACHED, *passes]})
    program = PassManager(Context(Target.parse("cpu")), verify=False).run(program, plan_passes(recipe, program))
    return Generator(lambda tensors: program(**tensors), program.contract, program.metadata, None)


@pytest.fixture(scope="module")
def llama() -> Generator:
    return generator("llama")


@pytest.fixture(scope="module")
def cheap() -> Generator:
    return generator("llama", {"rtn": {"bits": 4, "group_size": 16}})


def repetitive(length: int) -> list[list[int]]:
    return [(list(range(5, 12)) * length)[:length]]


def test_prompt_lookup_takes_the_longest_and_latest_match():
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 9, 2, 3, 8, 7, 2, 3], 2).tokens == [8, 7]
    assert lookup.propose([5, 1, 2, 3, 6, 4, 2, 3, 7, 1, 2, 3], 9).tokens == [6, 4, 2, 3, 7, 1, 2, 3]
    assert lookup.propose([1, 2, 3], 4).tokens == []
    assert lookup.propose([4], 4).tokens == []
    assert lookup.propose([1, 1], 0).tokens == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "deepseek_v2"])
def test_greedy_text_is_that_of_plain_decoding(name):
    target, draft = generator(name), generator(name, {"rtn": {"bits": 4, "group_size": 8}})
    for length in (1, 16):
        prompt = repetitive(length)
        plain = target.generate(prompt, max_new_tokens=24, eos_token_ids=())
        for by in ("prompt-lookup", draft, target):
            for draft_tokens in (1, 4):
                found = target.generate(
                    prompt, max_new_tokens=24, eos_token_ids=(), draft=by, draft_tokens=draft_tokens
                )
                assert found.tokens == plain.tokens
                assert found.finish_reasons == plain.finish_reasons
                assert found.timing.new_tokens == 24
                assert 0 <= found.timing.accepted_tokens <= found.timing.drafted_tokens
        # The program's own guesses all hold.
        assert found.timing.accepted_tokens == found.timing.drafted_tokens > 15


def test_penalties_ends_and_streams(llama, cheap):
    options = {"max_new_tokens": 20, "repetition_penalty": 1.3, "eos_token_ids": ()}
    plain = llama.generate(repetitive(9), **options).tokens[0]
    for by in ("prompt-lookup", cheap):
        assert llama.generate(repetitive(9), **options, draft=by).tokens[0] == plain
        assert list(llama.stream(repetitive(9), **options, draft=by)) == plain
    ended = {**options, "eos_token_ids": (plain[6],)}
    expected = llama.generate(repetitive(9), **ended)
    found = llama.generate(repetitive(9), **ended, draft=llama, draft_tokens=8)
    assert found.tokens == expected.tokens
    assert found.finish_reasons == ["eos"]


def test_sampling_is_reproducible(llama, cheap):
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 4, "draft": cheap, "eos_token_ids": ()}
    first, again, other = (llama.generate(repetitive(9), **options, seed=seed).tokens for seed in (3, 3, 4))
    assert first == again != other


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("certain", [False, True])
def test_accepted_tokens_have_the_programs_distribution(certain):
    random = torch.Generator().manual_seed(7)
    wanted = [torch.rand(1, 6, generator=random).softmax(-1) for _ in range(3)]
    guessed = (torch.rand(2, 6, generator=random) * 4).softmax(-1)
    rounds, first, second = 20_000, torch.zeros(6), torch.zeros(6)
    for _ in range(rounds):
        guesses = [2, 5] if certain else [int(draw(guessed[i : i + 1], random)) for i in range(2)]
        draft = Draft(guesses, None if certain else guessed)
        tokens = accept(draft, lambda kept: wanted[len(kept)], random)
        first[tokens[0]] += 1
        if len(tokens) > 1:
            second[tokens[1]] += 1
    # 5 degrees of freedom: 25.7 is passed once in ten thousand times; the seed is fixed.
    assert chi_square(first, wanted[0][0] * rounds) < 25.7
    assert second.sum() > 1000
    assert chi_square(second, wanted[1][0] * second.sum()) < 25.7


def test_sampled_text_has_the_distribution_of_plain_sampling(llama, cheap):
    prompt, rounds = repetitive(5), 400
    sampling = {"temperature": 1.0, "top_k": 3, "max_new_tokens": 2, "eos_token_ids": ()}
    plain, guessed = (
        [tuple(llama.generate(prompt, **sampling, seed=seed, **more).tokens[0]) for seed in range(rounds)]
        for more in ({}, {"draft": cheap, "draft_tokens": 1})
    )
    pairs = sorted(set(plain) | set(guessed))
    counts = torch.tensor([[sample.count(pair) for pair in pairs] for sample in (plain, guessed)], dtype=torch.float32)
    # Two samples of one distribution: the statistic has as many degrees of freedom as there are pairs but one.
    statistic = float(((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum())
    assert statistic < len(pairs) + 4 * (2 * len(pairs)) ** 0.5


@settings(max_examples=40, deadline=None)
@given(
    probabilities=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
    guess=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_what_has_no_probability_is_never_chosen(probabilities, guess, seed):
    wanted = torch.tensor([probabilities], dtype=torch.float32)
    wanted = wanted / wanted.sum()
    (token, *_) = accept(Draft([guess]), lambda _kept: wanted, torch.Generator().manual_seed(seed))
    assert wanted[0, token] > 0


def test_a_drafter_writes_over_what_fell():
    calls = []

    def extend(start: int, tokens: list[int]) -> torch.Tensor:
        calls.append((start, list(tokens)))
        return torch.nn.functional.one_hot((torch.tensor(tokens) + 1) % 9, 9).float()

    drafter = ModelDrafter(extend, Sampling(), torch.Generator())
    assert drafter.propose([1, 2], 3).tokens == [3, 4, 5]
    assert drafter.propose([1, 2, 3, 7], 2).tokens == [8, 0]
    assert calls == [(0, [1, 2]), (2, [3]), (3, [4]), (3, [7]), (4, [8])]


def test_distribution_of_greedy_choice_is_one_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert distribution(logits, Sampling(), []).tolist() == [[0, 1, 0]]
    assert distribution(logits, Sampling(repetition_penalty=4.0), [1, 9]).tolist() == [[0, 0, 1]]
    with pytest.raises(GenerationError, match="NaN"):
        distribution(logits * float("nan"), Sampling(), [])


def test_what_is_refused(llama):
    prompt = repetitive(4)
    with pytest.raises(GenerationError, match="draft_tokens is 0"):
        llama.generate(prompt, draft="prompt-lookup", draft_tokens=0)
    with pytest.raises(GenerationError, match=r"no draft 'lookup'.*Use 'prompt-lookup'"):
        llama.generate(prompt, draft="lookup")
    with pytest.raises(GenerationError, match="this is a int"):
        llama.generate(prompt, draft=3)
    with pytest.raises(GenerationError, match="2 prompts, and guesses are checked for one at a time"):
        llama.generate(prompt * 2, draft="prompt-lookup")
    with pytest.raises(GenerationError, match="as a ring of the last tokens"):
        generator("mistral").generate(prompt, draft="prompt-lookup")
    other = Generator(llama.run, llama.contract, llama.metadata.with_(vocab_size=7), None)
    with pytest.raises(GenerationError, match="vocabulary of 7 tokens, and the program one of"):
        llama.generate(prompt, draft=other)
