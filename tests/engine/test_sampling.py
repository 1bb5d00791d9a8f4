"""The filters keep what the warpers of `transformers` keep, and draws follow the probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graphwright.engine import sampling
from graphwright.engine.sampling import Sampling, choose, draw, warp
from graphwright.errors import GenerationError
from graphwright.ops.sample_tokens import keep_min_p, keep_top_k, keep_top_p

EXACT = {"rtol": 0.0, "atol": 0.0}


def logits(batch: int, size: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(batch, size, generator=torch.Generator().manual_seed(seed))


def theirs(warpers: list[LogitsProcessor], scores: Tensor, ids: Tensor | None = None) -> Tensor:
    tokens = torch.zeros(scores.shape[0], 1, dtype=torch.int64) if ids is None else ids
    for warper in warpers:
        scores = warper(tokens, scores)
    return scores


@st.composite
def cases(draw: st.DrawFn) -> Tensor:
    return logits(
        draw(st.integers(1, 4)), draw(st.integers(1, 700)), draw(st.integers(0, 9999)), draw(st.floats(0.01, 20))
    )


@given(cases(), st.integers(1, 900))
def test_top_k(scores: Tensor, k: int) -> None:
    torch.testing.assert_close(keep_top_k(scores, k), theirs([TopKLogitsWarper(k)], scores), **EXACT)


@given(cases(), st.floats(0.01, 0.999))
def test_top_p(scores: Tensor, p: float) -> None:
    found, expected = keep_top_p(scores, p), theirs([TopPLogitsWarper(p)], scores)
    differs = found.isinf() != expected.isinf()
    # The two sum in opposite orders, so a token whose sum is p itself may fall on either side.
    probabilities = scores.softmax(-1).double()
    for row, column in differs.nonzero().tolist():
        before = probabilities[row][scores[row] > scores[row, column]].sum()
        assert abs(float(before) - p) < 1e-5
    kept = ~found.isinf()
    assert kept.any(-1).all()
    torch.testing.assert_close(found[kept], scores[kept], **EXACT)


@pytest.mark.parametrize("size", [300, 3000, 5000])
@pytest.mark.parametrize("scale", [0.0, 0.1, 8.0], ids=["flat", "wide", "sharp"])
def test_top_p_needs_no_whole_sort_and_is_still_exact(size: int, scale: float) -> None:
    scores = logits(2, size, 1, scale)
    found, expected = keep_top_p(scores, 0.9), theirs([TopPLogitsWarper(0.9)], scores)
    assert (found.isinf().sum(-1) - expected.isinf().sum(-1)).abs().max() <= 1  # rounding at the border
    if scale == 8.0:
        torch.testing.assert_close(found, expected, **EXACT)


@given(cases(), st.floats(0, 1))
def test_min_p(scores: Tensor, p: float) -> None:
    torch.testing.assert_close(keep_min_p(scores, p), theirs([MinPLogitsWarper(p)], scores), **EXACT)


@given(cases(), st.floats(0.1, 3), st.integers(0, 99))
def test_repetition_penalty(scores: Tensor, penalty: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, scores.shape[1], (scores.shape[0], 5), generator=generator)
    seen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ids, True)
    expected = theirs([RepetitionPenaltyLogitsProcessor(penalty)], scores, ids)
    torch.testing.assert_close(sampling.penalize(scores, seen, penalty), expected, **EXACT)


@settings(max_examples=50)
@given(cases(), st.floats(0.1, 3), st.integers(1, 50), st.floats(0, 0.5))
def test_filters_apply_in_the_order_of_transformers(scores: Tensor, temperature: float, k: int, min_p: float) -> None:
    warpers = [
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(k),
        TopPLogitsWarper(0.999),
        MinPLogitsWarper(min_p),
    ]
    found = warp(scores, Sampling(temperature, k, 0.999, min_p)).isinf()
    assert (found != theirs(warpers, scores).isinf()).sum() <= scores.shape[0]  # rounding at the border of top-p


def test_ties_at_the_border_of_top_k_stay() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(scores, 1).isfinite().tolist() == [[False, True, True, False]]


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    assert choose(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), Sampling(), torch.Generator()).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_and_the_logits_stay_as_they_are(dtype: torch.dtype) -> None:
    scores = logits(2, 50, 0).to(dtype)
    before = scores.clone()
    every = Sampling(0.7, 10, 0.9, 0.01, 1.3, seed=4)
    tokens = choose(scores, every, every.generator(), torch.ones(2, 50, dtype=torch.bool))
    assert tokens.shape == (2,)
    assert tokens.dtype == torch.int64
    torch.testing.assert_close(scores, before, **EXACT)


def test_draws_follow_the_probabilities_and_never_take_a_removed_token() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]]).expand(40_000, -1)
    counts = draw(probabilities, torch.Generator().manual_seed(0)).bincount(minlength=6) / 40_000
    assert counts[[0, 2, 5]].sum() == 0
    assert (counts - probabilities[0]).abs().max() < 0.01


def test_a_seed_draws_the_same_tokens() -> None:
    scores, setting = logits(3, 90, 5), Sampling(1.0, seed=11)
    first = [choose(scores, setting, g, None).tolist() for g in [setting.generator()] for _ in range(5)]
    again = [choose(scores, setting, g, None).tolist() for g in [setting.generator()] for _ in range(5)]
    other = choose(scores, setting, Sampling(seed=12).generator()).tolist()
    assert first == again
    assert first[0] != first[1] or first[0] != other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_refused(temperature: float) -> None:
    scores = logits(2, 9, 0)
    scores[1, 4] = float("nan")
    with pytest.raises(GenerationError, match="NaN"):
        choose(scores, Sampling(temperature), torch.Generator())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(GenerationError, match=f"{name} is"):
        Sampling(**{name: value}).check()
