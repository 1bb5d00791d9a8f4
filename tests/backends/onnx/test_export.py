"""The folder that an export writes, and what is refused before any work."""

import json
import sys
from pathlib import Path

import pytest
import torch
from families.configs import VOCAB_SIZE, build

import graphwright
from graphwright import exporting
from graphwright.backends.onnx import exporter as onnx_exporter
from graphwright.backends.onnx import model as files
from graphwright.backends.onnx.exporter import FORMAT
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.runtime import Session
from graphwright.errors import ArtifactError, BackendError, RecipeError
from graphwright.feeding import logits_of
from graphwright.numerics import relative_error
from graphwright.recipe import Recipe, presets

INT4 = {"passes": ["merge_linear", "static_cache", "select_logits", {"rtn": {"bits": 4, "group_size": 32}}]}


def test_one_model_serves_prefill_and_decode_under_the_usual_names(tmp_path: Path) -> None:
    graphwright.export(build("llama"), "onnx", tmp_path / "out", recipe="fp32", verify=True)
    session = Session(tmp_path / "out", threads=1)
    assert list(session.inputs)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert session.outputs == ["logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))]
    shapes = {name: entry.shape for name, entry in session.inputs.items()}
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(manifest["files"])
    assert manifest["export"]["verified"]["relative_error"] < 1e-4


def test_the_exported_model_says_what_the_original_says(tmp_path: Path) -> None:
    model = build("qwen3")
    graphwright.export(model, "onnx", tmp_path / "out", options={"profile": "standard", "opset": 24})
    session = Session(tmp_path / "out", threads=1)
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(2))
    logits, _ = session.step(ids.numpy(), torch.ones_like(ids).numpy(), session.empty_past(2))
    expected = logits_of(graphwright.capture(model), ids)
    assert relative_error(torch.from_numpy(logits), expected) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profil": "ort"}, "no option 'profil'.*Did you mean profile"),
        ({"opset": 23}, "Option opset of onnx is 23"),
        ({"profile": "mobile"}, "Option profile of onnx is 'mobile'"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=message):
        exporting.export("nowhere", "onnx", tmp_path / "out", options=options)


def test_codes_without_a_type_are_refused_before_the_model_is_read(tmp_path: Path) -> None:
    standard = {"profile": "standard", "opset": 20}
    with pytest.raises(RecipeError, match=r"has no 4-bit type.*pass rtn.*wide_codes"):
        exporting.export("nowhere", "onnx", tmp_path / "out", recipe=INT4, options=standard)
    assert not list(tmp_path.iterdir())


def test_a_model_without_caches_is_verified_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 3)).eval()
    inputs = {"input": torch.randn(3, 6)}
    out = graphwright.export(model, "onnx", tmp_path / "out", recipe="none", example_inputs=inputs, verify=True)
    verified = json.loads((out / "manifest.json").read_text())["export"]["verified"]
    assert 0 <= verified["relative_error"] < 1e-5
    assert verified["tokens_per_second"] is None
    assert not (out / "genai_config.json").exists()


REFUSED = {
    "ort": {"nf4", "int3-gptq", "fp8", "int3-spqr"},
    "standard": {"nf4", "int3-gptq", "fp8", "int3-spqr"},
    "tensorrt": {"nf4", "int3-gptq", "int3-spqr"},
}
CARRIED = {"fp32", "bf16", "int8", "int8-dynamic", "int4", "int4-sym", "int4-dynamic", "int4-gptq", "int4-hqq"}


@pytest.mark.parametrize("profile", REFUSED)
def test_every_preset_is_carried_or_refused_by_its_recipe_alone(profile: str) -> None:
    """What is carried here is exported in test_weights; decomposed, everything is."""
    refused = {}
    for name in presets():
        options = OnnxOptions(profile=profile, opset=24)
        try:
            FORMAT.recipe(Recipe.load(name), options)
        except RecipeError as error:
            refused[name] = error.fix
        FORMAT.recipe(Recipe.load(name), OnnxOptions(profile=profile, opset=24, decompose=True))
    assert REFUSED[profile] <= set(refused)
    assert not CARRIED & set(refused)
    assert all("It carries int8, int4" in fix for fix in refused.values())


def test_mixed_widths_and_patterns_are_looked_into() -> None:
    mixed = Recipe.load({"passes": [{"rtn": {"bits": 4, "mixed_bits": 3.5}}]})
    with pytest.raises(RecipeError, match="format int2"):
        FORMAT.recipe(mixed, OnnxOptions())
    named = Recipe.load({"passes": [{"rtn": {"bits": 4, "layers": {"down": {"format": "int3"}}}}]})
    with pytest.raises(RecipeError, match="format int3"):
        FORMAT.recipe(named, OnnxOptions())
    experts = Recipe.load({"passes": ["fewer_active_experts"]})
    with pytest.raises(RecipeError, match="experts as one op"):
        FORMAT.recipe(experts, OnnxOptions())
    sparse = Recipe.load({"passes": [{"magnitude": {"ratio": 0.5}}, "compress_sparse"]})
    with pytest.raises(RecipeError, match="no form for weights without their zeros.*decompose=true"):
        FORMAT.recipe(sparse, OnnxOptions())
    coded = Recipe.load({"passes": [{"magnitude": {"ratio": 0.5}}, "rtn", "compress_sparse"]})
    assert [one.name for one in FORMAT.recipe(coded, OnnxOptions()).passes] == ["magnitude", "rtn"]


def test_a_missing_runtime_is_named_before_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"needs the package onnxruntime.*graphwright\[onnx\]"):
        exporting.export("nowhere", "onnx", tmp_path / "out", verify=True)


class Large(torch.nn.Module):
    """A linear layer over a gigabyte and more of a file that is one hole: no memory, and no time to fill it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def test_a_model_of_more_than_two_gigabytes_has_its_weights_beside_it(tmp_path: Path) -> None:
    """Beyond what one protobuf holds: what is written is a hole again, and the checker reads the model by its path."""
    rows, width = 65_600, 8_192
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(rows * width * 4)
    weight = torch.from_file(str(hole), shared=True, size=rows * width).view(rows, width)
    program = graphwright.capture(Large(weight), {"x": torch.randn(3, width)})
    model = files.build(program, OnnxOptions(profile="standard"))
    (stored,) = [v.const_value for v in model.graph.initializers.values() if v.const_value.nbytes > 1024]
    assert stored.nbytes > 2**31
    assert stored.raw.data_ptr() == program.weight("weight").data_ptr(), "the weight was copied"
    out = tmp_path / "out"
    out.mkdir()
    files.save(model, out)
    assert (out / files.MODEL).stat().st_size < 10_000
    assert (out / files.DATA).stat().st_size >= 2**31


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_exporter, "write_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graphwright.export(build("llama"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="no Graphwright artifact"):
        graphwright.export(build("llama"), "onnx", tmp_path / "out", overwrite=True)


def test_onnx_compiles_nothing() -> None:
    with pytest.raises(BackendError, match="format to export to"):
        graphwright.compile(build("llama"), options=graphwright.CompileOptions(backend="onnx"))


@pytest.mark.parametrize("decompose", [False, True])
def test_offset_formats_are_refused_in_every_profile(decompose):
    """Read as zero points, their offsets would give other numbers."""
    for profile in ("ort", "standard", "tensorrt"):
        problem, _ = OnnxOptions(profile=profile, opset=24, decompose=decompose).refusal("int4_offset")
        assert "an offset in place of zero points" in problem
