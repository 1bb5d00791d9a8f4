"""Quantized checkpoints made by the plainest packers: whole rows as one long integer, cut into words."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def words(row: list[int], bits: int) -> list[int]:
    """int32 words of one row of unsigned values, the first in the lowest bits."""
    number = sum(int(value) << (place * bits) for place, value in enumerate(row))
    count = -(-len(row) * bits // 32)
    cut = [(number >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in cut]


def packed_rows(values: Tensor, bits: int) -> Tensor:
    """[M, C] to int32 [M, words]."""
    return torch.tensor([words(row, bits) for row in values.tolist()], dtype=torch.int32)


@dataclass
class Made:
    """One layer: unsigned codes [N, K], zero points [N, G], scales [N, G], the group [K] of each column."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    groups: Tensor
    bits: int

    @property
    def dense(self) -> Tensor:
        """The weight [N, K] that it stands for, column by column."""
        columns = [
            (self.codes[:, k].float() - self.zero[:, g].float()) * self.scale[:, g].float()
            for k, g in enumerate(self.groups.tolist())
        ]
        return torch.stack(columns, 1)


def make(shape: tuple[int, int], bits: int, group_size: int, seed: int, *, symmetric: bool = False) -> Made:
    """Random codes over the whole range, with scales that keep a layer's outputs moderate."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    size = group_size if group_size > 0 else width
    count = -(-width // size)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    low, high = (1 << bits) // 4, 3 * (1 << bits) // 4 + 1
    zero = torch.randint(low, high, (rows, count), generator=generator)
    if symmetric:
        zero = torch.full((rows, count), 1 << (bits - 1))
    scale = ((torch.rand(rows, count, generator=generator) + 0.5) / (1 << bits) / 2).half()
    return Made(codes, zero, scale, torch.arange(width) // size, bits)


def layers(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, nn.Linear]:
    """The linear layers by name, without the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(skip)}


def write(folder: Path, model: PreTrainedModel, tensors: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> Path:
    """A directory: the model's config with `quantization_config`, and each named layer's weight replaced by `tensors`."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": config}))
    tied = model.config.tie_word_embeddings
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in tensors or not name.endswith(".weight")
        if not (tied and name == "lm_head.weight")
    }
    for layer, parts in tensors.items():
        state.update({f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()})
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_dense(model: PreTrainedModel, made: dict[str, Made]) -> PreTrainedModel:
    """The model, whose layers hold the weights that codes stand for."""
    with torch.no_grad():
        for name, layer in made.items():
            model.get_submodule(name).weight.copy_(layer.dense)
    return model


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits of a few tokens."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
