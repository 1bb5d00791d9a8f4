"""compressed-tensors directories: every format and strategy that is read, rounding of activations, what is refused."""

from typing import Any

import pytest
import torch
from families.configs import build
from interchange.making import Made, layers, logits, make, packed_rows, with_dense, write

from graphwright.errors import SourceError
from graphwright.interchange.packed import PackedLinear
from graphwright.numerics import relative_error
from graphwright.ops import quantize_dequantize
from graphwright.sources import open_model

FIRST = "model.layers.0.self_attn.q_proj"


def config(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def weights(bits: int = 4, strategy: str = "group", group_size: int | None = 32, symmetric: bool = True) -> dict:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group_size, "symmetric": symmetric}


FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def packed(made: Made, symmetric: bool) -> dict[str, torch.Tensor]:
    zero = {} if symmetric else {"weight_zero_point": packed_rows(made.zero.t(), made.bits).t()}
    shape = torch.tensor(made.codes.shape)
    words = packed_rows(made.codes, made.bits)
    return {"weight_packed": words, "weight_scale": made.scale.bfloat16(), "weight_shape": shape, **zero}


def plain(made: Made, symmetric: bool) -> dict[str, torch.Tensor]:
    middle = 1 << (made.bits - 1)
    zero = {} if symmetric else {"weight_zero_point": (made.zero - middle).to(torch.int8)}
    return {"weight": (made.codes - middle).to(torch.int8), "weight_scale": made.scale.float(), **zero}


@pytest.mark.parametrize(
    ("family", "form", "bits", "strategy", "symmetric"),
    [
        ("llama", "pack-quantized", 4, "group", True),
        ("qwen2", "pack-quantized", 4, "group", False),
        ("llama", "pack-quantized", 8, "channel", True),
        ("llama", "pack-quantized", 3, "group", False),
        ("llama", "pack-quantized", 6, "group", True),
        ("llama", "int-quantized", 8, "channel", False),
        ("llama", "naive-quantized", 8, "channel", True),
        ("llama", "int-quantized", 4, "group", True),
    ],
)
def test_integer_codes_stand_for_the_same_weights(tmp_path, family, form, bits, strategy, symmetric):
    model = build(family, tie_word_embeddings=True)
    group_size = 32 if strategy == "group" else 0
    made = {
        name: make(tuple(m.weight.shape), bits, group_size, seed, symmetric=symmetric)
        for seed, (name, m) in enumerate(layers(model).items())
    }
    if form == "pack-quantized":
        for layer in made.values():
            layer.scale = layer.scale.bfloat16()
    store = packed if form == "pack-quantized" else plain
    scheme = weights(bits, strategy, group_size or None, symmetric)
    write(tmp_path, model, {n: store(layer, symmetric) for n, layer in made.items()}, config(form, scheme))
    reference = with_dense(model, made)
    found = open_model(tmp_path, keep_codes=True).model
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert relative_error(logits(found), logits(reference)) < 1e-5
    floats = open_model(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, floats[name]) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_codes_that_do_not_cross_words(tmp_path, bits):
    made, per_word = make((64, 64), bits, 32, 0), 32 // bits

    def apart(values):
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
        return packed_rows(padded.reshape(-1, per_word), bits).reshape(values.shape[0], -1)

    words = {"weight_packed": apart(made.codes), "weight_zero_point": apart(made.zero.t()).t()}
    held = {**packed(made, False), **words, "weight_scale": made.scale}
    write(tmp_path, build("llama"), {FIRST: held}, config("pack-quantized", weights(bits, symmetric=False)))
    floats = open_model(tmp_path).model.get_submodule(FIRST)
    assert torch.equal(floats.weight, made.dense)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_fp8_codes_stand_for_the_same_weights(tmp_path, strategy):
    model, held, generator = build("llama"), {}, torch.Generator().manual_seed(0)
    for name, layer in layers(model).items():
        rows, width = layer.weight.shape
        shape = {"channel": (rows, 1), "tensor": (1,), "block": (-(-rows // 16), width // 32)}[strategy]
        scale = torch.rand(shape, generator=generator) * 0.01
        codes = (torch.randn(rows, width, generator=generator) * 30).to(torch.float8_e4m3fn)
        held[name] = {"weight": codes, "weight_scale": scale}
        block = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(32, 1) if strategy == "block" else scale
        with torch.no_grad():
            layer.weight.copy_(codes.float() * block)
    scheme = {**FP8, "strategy": strategy, "block_structure": [16, 32] if strategy == "block" else None}
    write(tmp_path, model, held, config("float-quantized", scheme))
    found = open_model(tmp_path, keep_codes=True).model
    assert found.get_submodule(FIRST).format == "fp8_e4m3"
    assert relative_error(logits(found), logits(model)) < 1e-5
    floats = open_model(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, floats[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "scale", "rounding"),
    [
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, None, ("int8", 0)),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}, 0.02, ("int8", 0)),
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, None, ("fp8_e4m3", 0)),
        ({"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16, "dynamic": True}, None, ("int8", 16)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_activations_are_rounded_as_the_config_says(tmp_path, inputs, scale, rounding):
    model = build("llama")
    made = make((64, 64), 8, 0, 0, symmetric=True)
    held = plain(made, True)
    if scale is not None:
        held["input_scale"] = torch.tensor([scale])
    write(tmp_path, model, {FIRST: held}, config("int-quantized", weights(8, "channel", None), inputs))
    layer = open_model(tmp_path, keep_codes=True).model.get_submodule(FIRST)
    x = torch.randn(2, 3, 64)
    static = None if scale is None else torch.tensor(scale)
    expected = quantize_dequantize.reference(x, static, *rounding) @ made.dense.t()
    assert relative_error(layer(x), expected) < 1e-5


def test_groups_are_chosen_by_name_and_ignored_layers_stay(tmp_path):
    model = build("llama")
    first, second = make((64, 64), 4, 32, 0, symmetric=True), make((96, 64), 8, 0, 1, symmetric=True)
    wide, narrow = weights(8, "channel", None), weights()
    groups = {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": wide, "format": "int-quantized"},
        "group_1": {"targets": [FIRST], "weights": narrow, "format": "pack-quantized"},
    }
    held = {FIRST: packed(first, True), "model.layers.1.mlp.up_proj": plain(second, True)}
    write(tmp_path, model, held, {**config("mixed-precision", {}), "config_groups": groups})
    found = open_model(tmp_path, keep_codes=True).model
    kept = {name: m.format for name, m in found.named_modules() if isinstance(m, PackedLinear)}
    assert kept == {FIRST: "int4", "model.layers.1.mlp.up_proj": "int8"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (config("nvfp4-pack-quantized", weights()), "format nvfp4-pack-quantized are not read"),
        (config("pack-quantized", weights(16)), "16-bit integer codes are not read"),
        (config("float-quantized", {**FP8, "num_bits": 4}), "4-bit floating-point codes"),
        (config("pack-quantized", weights(strategy="tensor_group")), "strategy tensor_group"),
        (
            config("int-quantized", weights(8), {"num_bits": 8, "symmetric": False, "dynamic": True}),
            "rounds activations",
        ),
        (config("pack-quantized", weights(), transform_config={"config_groups": {"a": 1}}), "has a transform_config"),
        (config("pack-quantized", weights(), sparsity_config={"format": "sparse-bitmask"}), "has a sparsity_config"),
        ({"quant_method": "compressed-tensors"}, "names no config_groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_is_refused(tmp_path, given, problem):
    write(tmp_path, build("llama"), {}, given)
    with pytest.raises(SourceError, match=problem):
        open_model(tmp_path, keep_codes=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("weight_scale"), f"no {FIRST}.weight_scale"),
        (lambda t: t.pop("weight_zero_point"), f"no {FIRST}.weight_zero_point"),
        (lambda t: t.update(weight_shape=torch.tensor([64, 60])), rf"{FIRST}.weight_shape says \[64, 60\]"),
        (
            lambda t: t.update(weight_packed=t["weight_packed"][:, :4]),
            rf"{FIRST}.weight_packed has the shape \[64, 4\]",
        ),
    ],
)
def test_tensors_that_do_not_go_together_are_named(tmp_path, change, problem):
    held = packed(make((64, 64), 4, 32, 0), False)
    change(held)
    write(tmp_path, build("llama"), {FIRST: held}, config("pack-quantized", weights(symmetric=False)))
    with pytest.raises(SourceError, match=problem):
        open_model(tmp_path, keep_codes=True)


def test_a_head_with_codes_beside_a_tied_table_in_floats(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    made = make((128, 64), 8, 0, 3, symmetric=True)
    given = {**config("pack-quantized", weights(8, "channel", None)), "ignore": []}
    write(tmp_path, model, {"lm_head": packed(made, True)}, given)
    found = open_model(tmp_path, keep_codes=True).model
    assert isinstance(found.lm_head, PackedLinear)
    assert torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight)
