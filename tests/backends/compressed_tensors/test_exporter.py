"""Directories that are written: `transformers` computes the program's logits from them, and reading gives the codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization.lifecycle import forward
from families.configs import build
from interchange.making import logits, make, write
from interchange.test_gguf import LINEAR
from interchange.test_gguf import write as write_gguf
from interchange.test_gptq import CONFIG, FIRST, tensors
from safetensors.torch import load_file

from graphwright import exporting
from graphwright.backends.compressed_tensors.exporter import FORMAT
from graphwright.errors import BackendError, RecipeError
from graphwright.export_format import Export
from graphwright.interchange.experts import PackedExperts
from graphwright.interchange.packed import PackedLinear
from graphwright.numerics import relative_error
from graphwright.ops import quantize_dequantize
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import open_model


def exported(model: Any, folder: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Program:
    """Writes a model, and returns the program that was written."""
    kept: list[Program] = []
    real = FORMAT.write

    def spy(self: Any, export: Export) -> dict[str, Any]:
        kept.append(export.program)
        return real(export)

    monkeypatch.setattr(type(FORMAT), "write", spy)
    exporting.export(model, "compressed-tensors", folder, recipe=Recipe.load(recipe), options=options)
    return kept[0]


def program_logits(program: Program) -> torch.Tensor:
    """Of the same tokens as `logits`."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    return program(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def loaded(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


W8 = {"bits": 8, "group_size": 0, "symmetric": True}


def tiny(family: str = "llama", **config: Any) -> transformers.PreTrainedModel:
    return build(family, num_hidden_layers=1, **config)


def check(folder: Path, program: Program, tolerance: float = 1e-5) -> PackedLinear:
    """What is written computes the program's logits in transformers, and is read again with the same codes."""
    assert relative_error(logits(loaded(folder)), program_logits(program)) < tolerance
    again, weights = open_model(folder, keep_codes=True).model, program.weights()
    assert relative_error(logits(again), program_logits(program)) < tolerance
    layers = {name: m for name, m in again.named_modules() if isinstance(m, PackedLinear)}
    for name, module in layers.items():
        assert torch.equal(module.weight, weights[f"{name}.weight_{module.format}"])
        assert torch.equal(module.weight_scale, weights[f"{name}.weight_scale"].float())
        zero = weights.get(f"{name}.weight_zero_point")
        assert (zero is None) == (module.weight_zero_point is None)
        assert zero is None or torch.equal(zero, module.weight_zero_point)
    return next(iter(layers.values()))


@pytest.mark.parametrize(
    ("family", "recipe", "form"),
    [
        ("llama", "int4", "pack-quantized"),
        ("qwen2", "int4-sym", "pack-quantized"),
        ("llama", "int8", "pack-quantized"),
        ("llama", {"passes": [{"rtn": {"bits": 2, "group_size": 16}}]}, "pack-quantized"),
        ("llama", {"passes": [{"rtn": {"bits": 8, "group_size": 32}}]}, "pack-quantized"),
        ("qwen2", {"passes": ["fp8"]}, "float-quantized"),
        ("llama", {"passes": [{"rtn": {"group_size": 32, "layers": {"down": {"format": "int8"}}}}]}, "pack-quantized"),
        ("llama", {"passes": [{"awq": {"group_size": 32}}]}, "pack-quantized"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:There is no calibration text")
def test_transformers_computes_the_programs_logits(tmp_path, monkeypatch, family, recipe, form):
    folder = tmp_path / "out"
    program = exported(tiny(family, tie_word_embeddings=family == "qwen2"), folder, recipe, monkeypatch)
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization_config"]["format"] == form
    assert written["architectures"] == [type(tiny(family)).__name__]
    check(folder, program)


def dynamic_scales(value: torch.Tensor, args: Any, module: Any, **_more: Any) -> tuple[torch.Tensor, None]:
    """The scale of each token, or group of a token: its largest magnitude is the largest code."""
    grouped = value.unflatten(-1, (-1, args.group_size)) if args.group_size else value
    largest = 448 if args.type == "float" else 127
    return grouped.abs().amax(-1, keepdim=not args.group_size) / largest, None


@pytest.mark.parametrize(
    ("recipe", "form"),
    [
        ("fp8", "float-quantized"),
        ({"passes": ["smoothquant", {"rtn": W8}, {"activations": {"static": True}}]}, "int-quantized"),
        ("int8-dynamic", "int-quantized"),
        ("int4-dynamic", "pack-quantized"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:There is no calibration text")
def test_rounded_activations(tmp_path, monkeypatch, recipe, form):
    # The package divides a token's largest magnitude by 127.5, where the program and vLLM divide it by 127.
    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", dynamic_scales)
    folder = tmp_path / "out"
    program = exported(tiny(), folder, recipe, monkeypatch)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == form
    layer = check(folder, program, 1e-4)
    (inputs, *_) = program.calls(quantize_dequantize.target)
    assert (layer.rounding.format, layer.rounding.group_size) == inputs.args[2:]
    assert (layer.rounding.scale is None) == (inputs.args[1] is None)


def test_a_checkpoint_in_codes_is_converted_with_its_codes(tmp_path, monkeypatch):
    source = tmp_path / "gptq"
    made = make((64, 64), 4, 32, 0)
    write(source, tiny(), {FIRST: tensors(made, second=False)}, CONFIG)
    program = exported(str(source), tmp_path / "out", "as-is", monkeypatch)
    check(tmp_path / "out", program)
    floats = open_model(tmp_path / "out").model.get_submodule(FIRST).weight
    assert torch.equal(floats, made.dense)


def test_a_tied_table_in_codes_is_written_in_floats(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", {**dict.fromkeys(LINEAR, "Q8_0"), "embed_tokens": "Q6_K"}, tied=True)
    program = exported(str(tmp_path / "tiny.gguf"), tmp_path / "out", "as-is", monkeypatch)
    check(tmp_path / "out", program)


def test_the_directory_is_whole_and_verified(tmp_path):
    model = tiny()
    folder = exporting.export(model, "compressed-tensors", tmp_path / "out", recipe="int4", verify=True)
    files = {file.name for file in folder.iterdir()}
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert files == written | {"manifest.json", "report.json", "report.html"}
    facts = json.loads((folder / "manifest.json").read_text())["export"]
    assert facts["verified"]["relative_error"] < 1e-5
    assert (facts["layers"], facts["groups"]) == (7, 1)


def test_half_precision_halves_what_is_not_quantized(tmp_path, monkeypatch):
    program = exported(tiny(), tmp_path / "out", "int4", monkeypatch, dtype="bfloat16")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.bfloat16}
    found, expected = logits(loaded(tmp_path / "out")).float(), program_logits(program)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ("int4-hqq", "int4 with fractional zero points"),
        ("nf4", "cannot carry weights in nf4"),
        ("int3-gptq", "cannot carry weights in int3"),
        ("llm-int8", "cannot carry what pass llm_int8 makes"),
        ("svd-llm", "cannot carry what pass svd_llm makes"),
        ("w4a8-quarot", "cannot carry what pass quarot makes"),
        ("sparse24-gptq", "cannot carry what pass sparse_gptq makes"),
        ("bf16", "cannot carry what pass cast makes"),
        ("fp32", "quantizes no weights"),
        ({"passes": [{"rtn": {"layers": {"down": {"format": "nf4", "symmetric": True}}}}]}, "nf4. At: layers down of"),
        ({"passes": [{"fp8": {"format": "fp8_e5m2"}}]}, "fp8_e5m2"),
    ],
    ids=str,
)
def test_recipes_are_refused_before_any_work(tmp_path, recipe, problem):
    with pytest.raises(RecipeError, match=problem) as caught:
        exporting.export("no/such/model", "compressed-tensors", tmp_path / "out", recipe=Recipe.load(recipe))
    assert "carries" in str(caught.value) or "in floating point needs no export" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_groups_that_do_not_divide_a_row_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(BackendError, match=r"down_proj reads 96 channels, which groups of 64 do not divide"):
        exporting.export(tiny(), "compressed-tensors", tmp_path / "out", recipe={"passes": ["rtn"]})
    assert not list(tmp_path.iterdir())


def test_act_order_is_refused(tmp_path):
    made = make((64, 64), 4, 32, 0)
    made.groups = made.groups.flip(0)
    write(tmp_path / "gptq", tiny(), {FIRST: tensors(made, second=False)}, CONFIG)
    with pytest.raises(BackendError, match="q_proj gathers its input"):
        exporting.export(str(tmp_path / "gptq"), "compressed-tensors", tmp_path / "out", recipe="as-is")


SYMMETRIC = {"group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("family", "rtn", "groups"),
    [
        ("mixtral", SYMMETRIC, 1),
        ("qwen3_moe", {"bits": 8, "group_size": 0, "symmetric": True}, 1),
        ("deepseek_v3", {**SYMMETRIC, "group_size": 8, "layers": {"self_attn": {"format": "int8"}}}, 3),
    ],
)
def test_experts_are_written_one_by_one(tmp_path, monkeypatch, family, rtn, groups):
    folder = tmp_path / "out"
    layers = 2 if family == "deepseek_v3" else 1
    model = build(family, num_hidden_layers=layers, **({"decoder_sparse_step": 1} if family == "qwen3_moe" else {}))
    program = exported(model, folder, {"passes": ["experts", {"rtn": rtn}]}, monkeypatch)
    assert len(json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]) == groups
    names = set(load_file(folder / "model.safetensors"))
    expert = "block_sparse_moe.experts.1.w3" if family == "mixtral" else "mlp.experts.1.up_proj"
    assert f"model.layers.{layers - 1}.{expert}.weight_packed" in names
    check(folder, program)
    again, weights = open_model(folder, keep_codes=True).model, program.weights()
    (found,) = ((n, m) for n, m in again.named_modules() if isinstance(m, PackedExperts))
    for stack in ("gate_up_proj", "down_proj"):
        for part in (found[1].format, "scale"):
            assert torch.equal(getattr(found[1], f"{stack}_{part}"), weights[f"{found[0]}.{stack}_{part}"])


@pytest.mark.parametrize(
    ("passes", "problem"),
    [
        (["experts", {"rtn": {"group_size": 32}}], "have zero points: transformers reads all experts"),
        ([{"rtn": SYMMETRIC}], "holds the weights of experts in floating point"),
        (
            ["experts", {"rtn": {**SYMMETRIC, "layers": {"experts.down": {"group_size": 16}}}}],
            "stored in several ways: transformers reads all experts",
        ),
    ],
)
def test_experts_that_would_be_read_wrongly_are_refused(tmp_path, passes, problem):
    with pytest.raises(BackendError, match=problem):
        exporting.export(
            build("mixtral", num_hidden_layers=1), "compressed-tensors", tmp_path / "out", recipe={"passes": passes}
        )
