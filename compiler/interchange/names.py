"""What a checkpoint calls the weights of a model, where `transformers` builds the model with other names.

    the directory                                      the model
    model.layers.0.block_sparse_moe.gate.weight        model.layers.0.mlp.gate.weight
    model.layers.0.block_sparse_moe.experts.0.w1.*     rows of model.layers.0.mlp.experts.gate_up_proj, expert 0
    model.layers.0.block_sparse_moe.experts.0.w3.*     the rows behind them

Modules of a mixture hold the weights of all experts in one tensor, and directories hold every expert by itself. Which
names belong together is what `transformers` itself reads such directories by; a layer in codes is found by the name
that its weight in floating point would have.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

PARTS = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "weight",
)  # fmt: skip
"""What the tensors of a layer in codes are called, beside that of its weight."""


class Names:
    """The tensors of a directory by the names of a model.

    Args:
        model: of `transformers`; another one is taken to have the names of the directory.
        stored: names of the directory's tensors.

    Attributes:
        stacks: for each parameter with the weights of several layers: a list for each part of its rows, gate before
            up, of the names of the layers, by expert.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str]) -> None:
        self.stacks: dict[str, list[list[str]]] = {}
        self._stored: dict[str, str] = {}
        self._renamings, self._converters = _conversions(model)
        members: dict[str, list[set[str]]] = {}
        known: dict[str, str] = {}
        for name in stored:
            layer, _, part = name.rpartition(".")
            if part not in PARTS:
                self._stored[self._renamed(name)[0]] = name
                continue
            if layer not in known:
                known[layer] = self._layer(layer, members)
            self._stored[f"{known[layer]}.{part}"] = name
        for parameter, parts in members.items():
            self.stacks[parameter] = [sorted(layers, key=_numbers) for layers in parts]

    def stored(self, name: str) -> str:
        """The directory's name of what the model calls `name`."""
        return self._stored.get(name, name)

    def _layer(self, layer: str, members: dict[str, list[set[str]]]) -> str:
        """The model's name of a layer; that of an expert stays as it is, and is noted among `members`."""
        target, pattern = self._renamed(f"{layer}.weight")
        if pattern is None:
            return target.removesuffix(".weight")
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        if _stacks(converter):
            parts = members.setdefault(target, [set() for _ in converter.source_patterns])
            parts[converter.source_patterns.index(pattern)].add(layer)
        return layer

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The model's name, and the pattern of names that are combined under it if it is one of several."""
        if not self._renamings and not self._converters:
            return name, None
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None] = rename_source_key(name, self._renamings, self._converters)
        return found


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """How transformers renames and combines what it reads for a model."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return [], []
    all_ = get_model_conversion_mapping(model)
    return [[one for one in all_ if isinstance(one, kind)] for kind in (WeightRenaming, WeightConverter)]  # type: ignore[return-value]


def _stacks(converter: Any) -> bool:
    """Whether it stacks the weights [N, K] of experts and puts the stacks below each other, and nothing else."""
    operations = [(type(one).__name__, getattr(one, "dim", None)) for one in converter.operations]
    return operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _numbers(name: str) -> list[int]:
    """The numbers in a name; those of one expert differ from those of another in one place."""
    return [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.|$)", name)]
