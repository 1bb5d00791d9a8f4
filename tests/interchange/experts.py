"""Checkpoints of mixtures whose experts are in codes, made expert by expert under the names that directories use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families.configs import build
from interchange.making import Made, layers, make, with_dense, write
from torch import Tensor, nn
from transformers import PreTrainedModel

OLD_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
"""What directories of Mixtral call the layers of an expert."""


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the weights of all experts of a layer, by name."""
    return {n: m for n, m in model.named_modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))}


def renamed(family: str, module: str, expert: int, part: str) -> str:
    """What the directory of a family calls one layer of an expert."""
    if family == "mixtral":
        return f"{module.replace('.mlp.', '.block_sparse_moe.')}.{expert}.{OLD_NAMES[part]}"
    return f"{module}.{expert}.{part}_proj"


def make_experts(
    model: PreTrainedModel, bits: int, group_size: int, *, symmetric: bool = False, down_bits: int | None = None
) -> dict[str, dict[str, list[Made]]]:
    """Random codes: for each module of experts, for gate, up and down, the layer of every expert."""
    made: dict[str, dict[str, list[Made]]] = {}
    for place, (name, module) in enumerate(stacks(model).items()):
        count, wide, hidden = module.gate_up_proj.shape
        shapes = {"gate": (wide // 2, hidden), "up": (wide // 2, hidden), "down": (hidden, wide // 2)}
        widths = {"gate": bits, "up": bits, "down": down_bits or bits}
        made[name] = {
            part: [
                make(shape, widths[part], group_size, 1000 * place + 10 * e + len(part), symmetric=symmetric)
                for e in range(count)
            ]
            for part, shape in shapes.items()
        }
    return made


def with_dense_experts(model: PreTrainedModel, made: dict[str, dict[str, list[Made]]]) -> PreTrainedModel:
    """The model, whose experts hold the weights that codes stand for."""
    with torch.no_grad():
        for name, parts in made.items():
            module = model.get_submodule(name)
            for e, (gate, up, down) in enumerate(zip(parts["gate"], parts["up"], parts["down"], strict=True)):
                module.gate_up_proj[e].copy_(torch.cat([gate.dense, up.dense]))
                module.down_proj[e].copy_(down.dense)
    return model


def write_mixture(
    folder: Path,
    family: str,
    store: Callable[[Made], dict[str, Tensor]],
    config: dict[str, Any],
    *,
    depth: int = 1,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    change: Callable[[dict[str, list[Made]]], None] = lambda _parts: None,
) -> tuple[dict[str, dict[str, list[Made]]], PreTrainedModel]:
    """A directory of a tiny mixture in 4-bit codes, and the same model with the weights that they stand for.

    Attention, shared experts and dense layers are in codes too; routers are not.
    """
    model = build(family, num_hidden_layers=depth)
    routers = ("lm_head", "mlp.gate", "shared_expert_gate")
    plain = {
        name: make(tuple(m.weight.shape), 4, 32, place, symmetric=symmetric)
        for place, (name, m) in enumerate(layers(model, routers).items())
    }
    made = make_experts(model, 4, 32, symmetric=symmetric)
    for parts in made.values():
        change(parts)
    for one in [*plain.values(), *(e for parts in made.values() for experts in parts.values() for e in experts)]:
        one.scale = one.scale.to(scale_dtype)
    held = {name: store(layer) for name, layer in plain.items()}
    for module, parts in made.items():
        for part, experts in parts.items():
            held |= {renamed(family, module, e, part): store(one) for e, one in enumerate(experts)}
    write_directory(folder, family, model, held, config)
    return made, with_dense_experts(with_dense(model, plain), made)


def write_directory(
    folder: Path, family: str, model: PreTrainedModel, held: dict[str, dict[str, Tensor]], config: dict[str, Any]
) -> PreTrainedModel:
    """Writes the directory without stacks of experts, under the family's old names; returns the model."""
    real = model.state_dict

    def state(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        kept = {n: t for n, t in real(*args, **kwargs).items() if t.dim() < 3}
        old = ".block_sparse_moe." if family == "mixtral" else ".mlp."
        return {name.replace(".mlp.", old): tensor for name, tensor in kept.items()}

    model.state_dict = state
    try:
        write(folder, model, held, config)
    finally:
        del model.state_dict
    return model
