"""Perplexity, divergence and agreement against closed forms, and comparisons with a model that is gone."""

import math

import pytest
import torch

from graphwright import accuracy
from graphwright.errors import GraphwrightError

WINDOWS = torch.arange(12).reshape(2, 6) % 7


def certain(ids: torch.Tensor, strength: float = 50.0) -> torch.Tensor:
    """Logits of a model that knows the next of the tokens 0, 1, … 6, 0, …"""
    return strength * torch.nn.functional.one_hot((ids + 1) % 7, 7).float()


def uniform(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, 7)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    measured = accuracy.measure(uniform, WINDOWS)
    assert measured.tokens == 10
    assert measured.perplexity == pytest.approx(7)
    assert measured.mean_kl is None
    assert measured.greedy_agreement is None


def test_a_model_diverges_from_itself_by_nothing_and_from_a_certain_one_by_the_vocabulary():
    same = accuracy.measure(certain, WINDOWS, reference=certain)
    assert same.perplexity == pytest.approx(1)
    assert same.mean_kl == pytest.approx(0, abs=1e-6)
    assert same.greedy_agreement == 1
    blind = accuracy.measure(uniform, WINDOWS, reference=certain)
    assert blind.reference_perplexity == pytest.approx(1)
    assert blind.mean_kl == pytest.approx(math.log(7), rel=1e-4)
    # Every logit is equally large, and the first of them is token 0.
    assert blind.greedy_agreement == pytest.approx(1 / 10)


def test_remembered_logits_are_those_of_the_model(tmp_path):
    calls = []

    def model(ids):
        calls.append(ids)
        return certain(ids)

    remembered = accuracy.remember(model, WINDOWS, tmp_path)
    assert len(calls) == 2
    for window in WINDOWS.flip(0):
        assert torch.equal(remembered(window[None]), certain(window[None]))
    assert len(calls) == 2


def test_evaluation_and_calibration_text_do_not_overlap():
    held_out, rest = accuracy.built_in_text(held_out=True), accuracy.built_in_text(held_out=False)
    assert 0.15 < len(held_out) / (len(held_out) + len(rest)) < 0.25
    assert held_out[:2000] not in rest


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(GraphwrightError, match="The text has 3 tokens, and one window takes 4"):
        accuracy.token_windows([1, 2, 3], 4, 1)
