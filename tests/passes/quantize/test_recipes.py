"""Every shipped recipe that quantizes compiles for this machine, computes what its graph says and calibrates on text."""

import pytest
import torch
from engine.test_tokenizer import byte_level
from families.configs import build
from passes.quantize.quantizing import batches

import graphwright
from graphwright import calibration
from graphwright.compiled import CompileOptions, with_calibration_text
from graphwright.errors import GraphwrightError
from graphwright.feeding import logits_of
from graphwright.numerics import mean_kl
from graphwright.recipe import Recipe, presets

NEW = (
    "fp8", "int3-gptq", "int3-spqr", "int4-awq", "int4-gptq", "llm-int8", "nf4", "w4a4-quarot", "w4a8-gptq", "w4a8-quarot",
    "w8a8-smoothquant", "w8a8-zeroquant",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", NEW)
def test_recipe_compiles_and_computes_what_its_graph_says(recipe):
    # How near it comes to the original is measured on a real model: random weights have nothing to lose or keep.
    model = build("llama", num_hidden_layers=1, intermediate_size=128)
    compiled = graphwright.compile(model, recipe, calibration=tuple(batches()), verify=False)
    ids = batches(2, 20, seed=1)[0]["input_ids"]
    assert mean_kl(compiled.logits(ids), logits_of(compiled.program, ids)) < 5e-3


def test_slow_formats_say_so_in_the_report():
    program = graphwright.rewrite(
        graphwright.capture(build("llama")), Recipe.load("nf4"), graphwright.Target.parse("cpu")
    )
    from graphwright.backend import coverage
    from graphwright.registry import backend

    found = coverage(program, backend("inductor"), graphwright.Target.parse("cpu"))
    assert "nf4 weights are dequantized" in found.reasons["quantized_linear"]


PRUNED = ("draft-pruned", "draft-skip", "sparse-wanda", "sparse24-gptq", "svd-llm")


@pytest.mark.parametrize("recipe", [name for name in presets() if name not in (*NEW, *PRUNED)])
def test_recipes_without_measurements_read_no_text(recipe, tmp_path):
    options = CompileOptions()
    assert with_calibration_text(options, Recipe.load(recipe), graphwright.capture(build("llama")), tmp_path) is options


def test_text_becomes_windows_spread_over_it(tmp_path):
    byte_level(tmp_path)
    text = "".join(chr(97 + i // 100) for i in range(1000))
    windows = calibration.from_text(tmp_path, text, samples=3, length=10)
    first = [int(batch["input_ids"][0, 0]) for batch in windows]
    assert [tuple(batch["input_ids"].shape) for batch in windows] == [(1, 10)] * 3
    assert first == sorted(first)
    assert first[0] < first[1] < first[2]


def test_compile_calibrates_on_text_where_there_is_a_tokenizer(tmp_path):
    byte_level(tmp_path)
    # The context of the tiny model is shorter than the windows that are asked for.
    options = CompileOptions(calibration_text="abc" * 400, calibration_samples=3, calibration_length=600)
    made = with_calibration_text(options, Recipe.load("int4-gptq"), graphwright.capture(build("llama")), tmp_path)
    assert [tuple(batch["input_ids"].shape) for batch in made.calibration] == [(1, 512)] * 2


def test_text_that_is_too_short_is_refused(tmp_path):
    byte_level(tmp_path)
    with pytest.raises(GraphwrightError, match="has 5 tokens, and one window takes 10"):
        calibration.from_text(tmp_path, "short", samples=3, length=10)


def test_a_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xff")
    for name in ("missing", "binary"):
        with pytest.raises(GraphwrightError, match=f"The text file .*{name} cannot be read"):
            calibration.read_text(tmp_path / name)


def test_random_state_is_untouched():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    graphwright.rewrite(
        graphwright.capture(build("llama")),
        Recipe.load({"passes": ["quarot", "gptq"]}),
        graphwright.Target.parse("cpu"),
        CompileOptions(calibration=tuple(batches())),
    )
    assert torch.equal(torch.rand(1), expected)
