"""SmolLM2-135M-Instruct, int4: captured, compiled, saved, loaded; it answers in English and stays close to itself."""

import pytest
import torch

import graphwright
from graphwright import accuracy
from graphwright.engine.tokenizer import Tokenizer
from graphwright.feeding import logits_of
from graphwright.sources import demo_model


@pytest.mark.real_model
@pytest.mark.slow
def test_int4_end_to_end(tmp_path):
    compiled = graphwright.compile(demo_model(), "int4", evaluate=2)
    counts = compiled.report.ops["after"]
    assert counts["attention"] == 30
    assert counts["rms_norm"] == 61
    assert counts["rope"] == 60
    assert counts["gated_activation"] == 30
    assert counts["kv_cache_update"] == 60
    measured = compiled.report.accuracy
    assert measured["tokens"] == 254
    assert measured["reference_perplexity"] < measured["perplexity"] < 2 * measured["reference_perplexity"]
    assert 0.01 < measured["mean_kl"] < 0.5
    assert 0.6 < measured["greedy_agreement"] < 1
    compiled.save(tmp_path / "int4")
    size = sum(file.stat().st_size for file in (tmp_path / "int4").rglob("*") if file.is_file())
    assert size < 110e6

    loaded = graphwright.load(tmp_path / "int4")
    answer = loaded.generate("What is the capital of France?", chat=True, max_new_tokens=24).texts[0]
    assert "Paris" in answer

    tokens = Tokenizer(tmp_path / "int4" / "tokenizer").encode(accuracy.built_in_text(held_out=True))
    windows = accuracy.token_windows(tokens, 64, 2)
    result = accuracy.measure(loaded.logits, windows, reference=lambda ids: logits_of(loaded.program, ids))
    assert result.mean_kl is not None
    assert result.mean_kl < 1e-4, "the compiled program computes what its graph says"
    assert result.perplexity < 60
    assert torch.isfinite(loaded.logits(windows[:1])).all()
