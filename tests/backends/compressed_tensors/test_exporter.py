"""Directories that are written: `transformers` computes the program's logits from them, and reading gives the codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints.making import logits, make, write
from checkpoints.test_gguf import LINEAR
from checkpoints.test_gguf import write as write_gguf
from checkpoints.test_gptq import CONFIG, FIRST, tensors
from families.configs import build

from graphwright import exporting
from graphwright.backends.compressed_tensors.exporter import EXPORTER
from graphwright.calibration import from_tokens
from graphwright.checkpoints.packed import PackedLinear
from graphwright.errors import BackendError, RecipeError
from graphwright.numerics import relative_error
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import open_model


def exported(model: Any, folder: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Program:
    """Writes a model, and returns the program that was written."""
    kept: list[Program] = []
    real = EXPORTER.write

    def spy(self: Any, program: Program, *rest: Any) -> dict[str, Any]:
        kept.append(program)
        return real(program, *rest)

    monkeypatch.setattr(type(EXPORTER), "write", spy)
    exporting.export(model, "compressed-tensors", folder, recipe=Recipe.load(recipe), options=options)
    return kept[0]


def program_logits(program: Program) -> torch.Tensor:
    """Of the same tokens as `logits`."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    return program(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def loaded(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def passes(*entries: Any) -> dict[str, Any]:
    return {"passes": list(entries)}


RTN4 = {"rtn": {"bits": 4, "group_size": 32}}


@pytest.mark.parametrize(
    ("family", "recipe", "form"),
    [
        ("llama", passes(RTN4), "pack-quantized"),
        ("qwen2", passes({"rtn": {"bits": 4, "group_size": 32, "symmetric": True}}), "pack-quantized"),
        ("llama", passes({"rtn": {"bits": 3, "group_size": 32}}), "pack-quantized"),
        ("llama", passes({"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}), "pack-quantized"),
        ("llama", passes({"rtn": {"bits": 8, "group_size": 32}}), "pack-quantized"),
        ("qwen2", passes({"fp8": {}}), "float-quantized"),
        ("llama", passes({"rtn": {**RTN4["rtn"], "layers": {"down": {"format": "int8"}}}}), "pack-quantized"),
    ],
    ids=str,
)
def test_transformers_computes_the_programs_logits(tmp_path, monkeypatch, family, recipe, form):
    folder = tmp_path / "out"
    program = exported(build(family, tie_word_embeddings=family == "qwen2"), folder, recipe, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == form
    assert relative_error(logits(loaded(folder)), program_logits(program)) < 1e-5
    again = open_model(folder, keep_codes=True).model
    assert relative_error(logits(again), program_logits(program)) < 1e-5
    weights = program.weights()
    for name, module in again.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.weight, weights[f"{name}.weight_{module.format}"])
            assert torch.equal(module.weight_scale, weights[f"{name}.weight_scale"].float())


@pytest.mark.parametrize(
    ("recipe", "form", "tolerance"),
    [
        (passes({"fp8": {}}, {"activations": {"format": "fp8_e4m3"}}), "float-quantized", 1e-3),
        (passes({"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}, {"activations": {"static": True}}),
         "int-quantized", 1e-3),
    ],
)  # fmt: skip
def test_rounded_activations(tmp_path, monkeypatch, recipe, form, tolerance):
    folder = tmp_path / "out"
    program = exported(build("llama"), folder, recipe, monkeypatch)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == form
    # Both round alike; what lies at an edge may fall to either side.
    assert relative_error(logits(loaded(folder)), program_logits(program)) < tolerance
