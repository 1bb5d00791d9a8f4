"""Experts that a checkpoint holds in codes: bit for bit in one tensor, under every family's names, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families.configs import build
from interchange import test_awq, test_compressed_tensors, test_gptq
from interchange.experts import make_experts, renamed, stacks, with_dense_experts, write_directory, write_mixture
from interchange.making import Made, logits

from graphwright import packing
from graphwright.capture import capture
from graphwright.errors import SourceError
from graphwright.interchange.experts import PackedExperts
from graphwright.interchange.packed import Packed
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import moe_routing, quantized_experts
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import open_model
from graphwright.target import Target

CT = test_compressed_tensors
FAMILIES = {"mixtral": 1, "qwen2_moe": 1, "qwen3_moe": 2, "deepseek_v2": 2, "deepseek_v3": 2}
"""Families, and the layers of which at least one has experts."""


def gptq(made: Made) -> dict[str, torch.Tensor]:
    return test_gptq.tensors(made, second=False)


def packed(made: Made) -> dict[str, torch.Tensor]:
    return CT.packed(made, symmetric=False)


def symmetric(made: Made) -> dict[str, torch.Tensor]:
    return CT.packed(made, symmetric=True)


BF16: dict[str, Any] = {"scale_dtype": torch.bfloat16}
FORMS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, test_gptq.CONFIG, {}),
    "awq": (test_awq.tensors, test_awq.CONFIG, {}),
    "compressed-tensors": (packed, CT.config("pack-quantized", CT.weights(symmetric=False)), BF16),
    "symmetric": (symmetric, CT.config("pack-quantized", CT.weights()), {**BF16, "symmetric": True}),
}


def check_codes(module: PackedExperts, parts: dict[str, list[Made]], symmetric: bool) -> None:
    """Codes, zero points and scales are those of the checkpoint, expert by expert."""
    sizes = {"gate_up_proj": module.up_group_size, "down_proj": module.down_group_size}
    for stack, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        stored, scale, zero = (getattr(module, f"{stack}_{part}") for part in (module.format, "scale", "zero_point"))
        assert (zero is None) == symmetric
        for e in range(len(stored)):
            made = [parts[name][e] for name in names]
            codes = packing.unpack(stored[e], module.format, sizes[stack])
            assert torch.equal(codes.long(), torch.cat([one.codes for one in made]))
            assert torch.equal(scale[e].float(), torch.cat([one.scale for one in made]).float())
            assert zero is None or torch.equal(zero[e].long(), torch.cat([one.zero for one in made]))


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("mixtral", "gptq"),
        ("mixtral", "awq"),
        ("qwen2_moe", "gptq"),
        ("qwen3_moe", "compressed-tensors"),
        ("qwen3_moe", "symmetric"),
        ("deepseek_v2", "awq"),
        ("deepseek_v3", "gptq"),
    ],
)
def test_codes_are_kept_bit_for_bit(tmp_path, monkeypatch, family, form):
    store, config, options = FORMS[form]
    made, reference = write_mixture(tmp_path, family, store, config, depth=FAMILIES[family], **options)
    with monkeypatch.context() as patched:
        patched.setattr(Packed, "dense", lambda _self: pytest.fail("dequantized"))
        source = open_model(tmp_path, keep_codes=True)
    assert len(source.notes) == 1
    found = {name: m for name, m in source.model.named_modules() if isinstance(m, PackedExperts)}
    assert found.keys() == made.keys()
    for name, module in found.items():
        check_codes(module, made[name], bool(options.get("symmetric")))
    assert relative_error(logits(source.model), logits(reference)) < 1e-5
    floats = open_model(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, floats[name]) for name, tensor in reference.state_dict().items())


def as_is(folder: Path) -> Program:
    """What the first passes of the recipe make of a directory."""
    program = capture(open_model(folder, keep_codes=True).model)
    recipe = Recipe.load({"passes": ["experts", "keep_codes"]})
    return PassManager(Context(Target.parse("cpu"))).run(program, plan_passes(recipe, program))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_router_of_experts_in_codes_is_raised(tmp_path, family):
    _, reference = write_mixture(tmp_path, family, gptq, test_gptq.CONFIG, depth=FAMILIES[family])
    program = as_is(tmp_path)
    count = len(stacks(reference))
    assert len(list(program.calls(quantized_experts.target))) == len(list(program.calls(moe_routing.target))) == count
    raised, kept = program.history[-2:]
    assert "left" not in raised.notes
    experts = len(next(iter(stacks(reference).values())).gate_up_proj)
    assert kept.notes["layers"][f"{experts} experts, int4 in groups of 32"] == count
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    found = program(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    assert relative_error(found, logits(reference)) < 1e-5


def shuffled(parts: dict[str, list[Made]]) -> None:
    """Act-order: the down projection of the third expert has its columns grouped in another order."""
    parts["up"][2].groups = parts["up"][2].groups.flip(0)


def test_act_order_is_refused_with_the_expert_named_unless_weights_are_read_in_floats(tmp_path):
    _, reference = write_mixture(tmp_path, "mixtral", gptq, test_gptq.CONFIG, change=shuffled)
    with pytest.raises(SourceError, match=r"layers.0.mlp.experts.gate_up_proj of expert 2 .*act-order") as caught:
        open_model(tmp_path, keep_codes=True)
    assert "desc_act=False" in str(caught.value)
    assert relative_error(logits(open_model(tmp_path).model), logits(reference)) < 1e-5


def held(family: str, bits: dict[str, int]) -> tuple[Any, dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """A model, its experts in packed codes of several widths, and a config that says so."""
    model = build(family, num_hidden_layers=1)
    made = make_experts(model, bits["gate"], 32, symmetric=True, down_bits=bits["down"])
    layers = {
        renamed(family, module, e, part): CT.plain(one, True) | {"weight_scale": one.scale}
        for module, parts in made.items()
        for part, experts in parts.items()
        for e, one in enumerate(experts)
    }
    weights = {part: CT.weights(width) for part, width in bits.items()}
    groups = {part: {"targets": [f"re:.*{part}_proj"], "weights": scheme} for part, scheme in weights.items()}
    config = {**CT.config("int-quantized", {}), "config_groups": groups}
    return with_dense_experts(model, made), layers, config


def test_products_in_several_widths_are_dequantized_and_said_to_be(tmp_path):
    model, layers, config = held("qwen3_moe", {"gate": 4, "up": 4, "down": 8})
    write_directory(tmp_path, "qwen3_moe", model, layers, config)
    source = open_model(tmp_path, keep_codes=True)
    assert source.notes[1] == (
        "the experts model.layers.0.mlp.experts were dequantized: their first product is in int4 and the second in int8"
    )
    assert relative_error(logits(source.model), logits(model)) < 1e-5


def test_experts_in_floats_beside_layers_in_codes(tmp_path):
    model, layers, config = held("qwen3_moe", {"gate": 8, "up": 8, "down": 8})
    expert = renamed("qwen3_moe", "model.layers.0.mlp.experts", 1, "down")
    layers[expert] = {"weight": model.model.layers[0].mlp.experts.down_proj[1].detach()}
    write_directory(tmp_path, "qwen3_moe", model, layers, config)
    source = open_model(tmp_path, keep_codes=True)
    assert source.notes[1].endswith("some are in codes, and others in floating point")
    assert relative_error(logits(source.model), logits(model)) < 1e-5


def test_rounding_of_the_inputs_of_experts_is_left_out_and_said_to_be(tmp_path):
    model, layers, config = held("qwen3_moe", {"gate": 8, "up": 8, "down": 8})
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config["config_groups"] = {
        n: {**group, "input_activations": inputs} for n, group in config["config_groups"].items()
    }
    write_directory(tmp_path, "qwen3_moe", model, layers, config)
    source = open_model(tmp_path, keep_codes=True)
    count = len(model.model.layers[0].mlp.experts.down_proj)
    assert (
        source.notes[1] == f"{3 * count} layers of experts read their inputs as they are, which the checkpoint rounds"
    )
    assert relative_error(logits(source.model), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: [t.pop(name) for name in list(t) if ".3." in name], r"holds 7 layers such as .* is made of 8"),
        (lambda t: t[FIRST].pop("weight_scale"), "FIRST.weight is torch.int8"),
        (lambda t: t[FIRST].update(weight=t[FIRST]["weight"][:, :4]), "FIRST.weight has the shape"),
        (lambda t: t[FIRST].update(bias=torch.ones(32)), "FIRST.bias holds values, and the model's experts add none"),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, change, problem):
    model, layers, config = held("qwen3_moe", {"gate": 8, "up": 8, "down": 8})
    change(layers)
    write_directory(tmp_path, "qwen3_moe", model, layers, config)
    with pytest.raises(SourceError, match=problem.replace("FIRST", FIRST)):
        open_model(tmp_path, keep_codes=True)


FIRST = "model.layers.0.mlp.experts.0.gate_proj"
