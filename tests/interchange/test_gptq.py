"""GPTQ directories: every width, both versions of zero points, act-order, and files that do not go together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families.configs import build
from interchange.making import Made, layers, logits, make, packed_rows, with_dense, write
from safetensors.torch import load_file, save_file

from graphwright.errors import SourceError
from graphwright.interchange.packed import PackedLinear
from graphwright.numerics import relative_error
from graphwright.sources import open_model

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def tensors(made: Made, second: bool) -> dict[str, torch.Tensor]:
    zero = made.zero if second else (made.zero - 1) % (1 << made.bits)
    return {
        "qweight": packed_rows(made.codes, made.bits).t(),
        "qzeros": packed_rows(zero.t(), made.bits),
        "scales": made.scale.t(),
        "g_idx": made.groups.int(),
    }


def checkpoint(folder: Path, family: str = "llama", act_order: bool = False, depth: int = 2, **config: Any) -> Any:
    """A directory of a tiny model, and the same model with the weights that its codes stand for."""
    model, config = build(family, num_hidden_layers=depth), {**CONFIG, **config}
    second = config.get("checkpoint_format") == "gptq_v2"
    made = {
        name: make(tuple(m.weight.shape), config["bits"], config["group_size"], seed, symmetric=config["sym"])
        for seed, (name, m) in enumerate(layers(model).items())
    }
    if act_order:
        for name, layer in made.items():
            # Layers that read the same input were ordered by the same activations.
            seed = 7 if "down" not in name else 8
            order = torch.randperm(layer.groups.numel(), generator=torch.Generator().manual_seed(seed))
            layer.groups = layer.groups[order]
    write(folder, model, {name: tensors(layer, second) for name, layer in made.items()}, config)
    return made, with_dense(model, made)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"checkpoint_format": "gptq_v2"}),
        ("llama", {"bits": 8, "sym": True}),
        ("qwen2", {"bits": 8, "group_size": -1}),
        ("qwen2", {"bits": 3}),
        ("llama", {"bits": 2, "group_size": 16}),
        ("llama", {"sym": True, "group_size": 64}),
    ],
    ids=str,
)
def test_codes_stand_for_the_same_weights(tmp_path, family, config):
    made, reference = checkpoint(tmp_path, family, **config)
    source = open_model(tmp_path, keep_codes=True)
    for name in made:
        module = source.model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        assert (module.weight_zero_point is None) == bool(config.get("sym"))
    assert not any(name.rpartition(".")[0] in made for name, p in source.model.named_parameters() if p.dim() == 2)
    assert relative_error(logits(source.model), logits(reference)) < 1e-5
    floats = open_model(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, floats[name]) for name, tensor in reference.state_dict().items())


def test_act_order_becomes_a_gather_that_siblings_share(tmp_path):
    _, reference = checkpoint(tmp_path, act_order=True, desc_act=True)
    model = open_model(tmp_path, keep_codes=True).model
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.columns is attention.k_proj.columns
    assert relative_error(logits(model), logits(reference)) < 1e-5
    floats = open_model(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, floats[name]) for name, tensor in reference.state_dict().items())


def test_a_symmetric_checkpoint_that_stores_the_second_version_under_the_first_name(tmp_path):
    model = build("llama")
    made = {n: make(tuple(m.weight.shape), 4, 32, i, symmetric=True) for i, (n, m) in enumerate(layers(model).items())}
    config = {**CONFIG, "sym": True, "checkpoint_format": "gptq"}
    write(tmp_path, model, {name: tensors(layer, second=True) for name, layer in made.items()}, config)
    found = open_model(tmp_path, keep_codes=True).model
    assert relative_error(logits(found), logits(with_dense(model, made))) < 1e-5


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"bits": 5}, "GPTQ weights of 5 bits are not read"),
        ({"checkpoint_format": "marlin"}, "laid out for marlin"),
        ({"dynamic": {"-:.*down.*": {}}}, "rules of their own"),
        ({"quant_method": "exotic"}, "by exotic, which is not read"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, config, problem):
    write(tmp_path, build("llama"), {}, {**CONFIG, **config})
    refused(tmp_path, problem)


def refused(folder: Path, problem: str) -> None:
    with pytest.raises(SourceError, match=problem) as caught:
        open_model(folder, keep_codes=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("scales"), f"no {FIRST}.scales"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :-1]), rf"{FIRST}.qzeros has the shape \[2, 7\]"),
        (lambda t: t.update(qweight=t["qweight"].float()), f"{FIRST}.qweight is torch.float32"),
        (lambda t: t.update(scales=t["scales"] / 0), f"{FIRST}.scales holds values that are NaN"),
        (lambda t: t.update(g_idx=torch.zeros(64, dtype=torch.int32)), f"{FIRST}.g_idx does not put 32 columns"),
        (lambda t: t.update(bias=torch.ones(64)), f"{FIRST}.bias holds values"),
    ],
)
def test_tensors_that_do_not_go_together_are_named(tmp_path, change, problem):
    model = build("llama")
    held = tensors(make((64, 64), 4, 32, 0), second=False)
    change(held)
    write(tmp_path, model, {FIRST: held}, CONFIG)
    refused(tmp_path, problem)


def test_a_missing_weight_and_codes_of_no_layer(tmp_path):
    model = build("llama")
    held = tensors(make((64, 64), 4, 32, 0), second=False)
    write(tmp_path, model, {FIRST: {"scales": held["scales"]}}, CONFIG)
    refused(tmp_path, f"lacks 1 weights of LlamaForCausalLM, the first is {FIRST}.weight")
    write(tmp_path, model, {"model.layers.9.other": held}, CONFIG)
    refused(tmp_path, r"4 tensors of codes for which LlamaForCausalLM has no layer")


def test_a_truncated_file_and_missing_parts(tmp_path):
    checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, "cannot be read: SafetensorError")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    refused(tmp_path, "lack the file part-1.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    file.unlink()
    refused(tmp_path, "holds no safetensors file")


def test_experts_under_names_that_are_not_known_are_refused(tmp_path):
    model = build("qwen3_moe", num_hidden_layers=1)
    made = {f"model.layers.0.mlp.many.{e}.up_proj": make((32, 64), 4, 32, e) for e in range(2)}
    write(tmp_path, model, {name: tensors(layer, second=False) for name, layer in made.items()}, CONFIG)
    file = tmp_path / "model.safetensors"
    held = {name: tensor for name, tensor in load_file(file).items() if "gate_up_proj" not in name}
    save_file(held, file, metadata={"format": "pt"})
    for keep_codes in (True, False):
        with pytest.raises(
            SourceError, match=r"mlp.experts.gate_up_proj holds the weights of all experts .* none of them"
        ):
            open_model(tmp_path, keep_codes=keep_codes)
