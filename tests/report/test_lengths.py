"""Perplexity over length: against a plain loop, in the report of a compile, on the page, and where it is refused."""

import math
from pathlib import Path

import pytest
import torch
from families.configs import build
from report.made import llama_report
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from torch.nn import functional

import graphwright
from graphwright import accuracy
from graphwright.errors import GraphwrightError
from graphwright.report.data import Report
from graphwright.report.html import render
from graphwright.report.lengths import length_chart


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama of 48 positions with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=256, max_position_embeddings=48, num_hidden_layers=1).save_pretrained(folder)
    fast = Fast(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    return folder


def test_all_lengths_score_the_same_tokens():
    """Against a plain loop, with logits that depend on how much of the text before is seen."""
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 50, (90,), generator=torch.Generator().manual_seed(2)).tolist()

    def logits(ids: torch.Tensor, count: int) -> torch.Tensor:
        return table[ids].cumsum(1)[:, -count:]

    ends = accuracy.text_ends(tokens, [40, 7])
    assert ends == [40, 90]
    found = accuracy.over_lengths(logits, tokens, ends, [40, 7])
    for length in (40, 7):
        losses = []
        for end in (40, 90):
            for place in range(end - 6, end):
                seen = table[tokens[end - length : place]].sum(0)
                losses.append(float(functional.cross_entropy(seen[None], torch.tensor([tokens[place]]))))
        assert math.isclose(found[length], math.exp(sum(losses) / len(losses)), rel_tol=1e-4)


@pytest.mark.parametrize("lengths", [[], [1, 8], [91]])
def test_lengths_that_a_text_does_not_show_are_refused(lengths):
    with pytest.raises(GraphwrightError, match="A text of 90 tokens does not show perplexity over lengths"):
        accuracy.text_ends(list(range(90)), lengths)


def test_a_compile_measures_the_original_within_its_context_and_the_program_beyond(model):
    recipe = {"passes": [{"yarn": {"factor": 2}}, "select_logits"]}
    rows = graphwright.compile(str(model), recipe, verify=False, lengths=(24, 48, 96)).report.lengths
    assert [row["length"] for row in rows] == [24, 48, 96]
    assert rows[2]["reference_perplexity"] is None
    for row in rows[:2]:
        assert row["perplexity"] > 1
        assert row["reference_perplexity"] != row["perplexity"], "YaRN changes short texts too"
    with pytest.raises(GraphwrightError, match="asked for at 97 tokens, and the rewritten program takes 96"):
        graphwright.compile(str(model), recipe, verify=False, lengths=(97,))


def test_what_cannot_run_here_is_refused_before_the_work(tiny_model_directory):
    with pytest.raises(GraphwrightError, match="a causal model with a tokenizer"):
        graphwright.compile(str(tiny_model_directory), "none", lengths=(8,))


def test_the_page_draws_the_curves():
    made = Report.from_json(llama_report().to_json())
    assert length_chart(made) is None
    assert "Perplexity over length" not in render(made)
    made.lengths = [
        {"length": 1024, "perplexity": 9.5, "reference_perplexity": 9.25},
        {"length": 8192, "perplexity": 8.75, "reference_perplexity": None},
    ]
    before, after = length_chart(made).curves
    assert (len(before.marks), len(after.marks)) == (1, 2)
    assert after.marks[0].y < before.marks[0].y < after.marks[1].y, "a larger perplexity stands higher"
    page = render(made)
    for text in ("Perplexity over length", "after, 8192 tokens: perplexity 8.75", "before, 1024 tokens"):
        assert text in page
