"""compressed-tensors checkpoints, which llm-compressor writes and vLLM serves.

pack-quantized    weight_packed int32 [N, K * bits / 32], weight_scale [N, G], weight_shape [2];
                  asymmetric: weight_zero_point int32 [N * bits / 32, G], packed along N
int-quantized, naive-quantized    weight int8 [N, K], weight_scale, weight_zero_point [N, G] int8
float-quantized, naive-quantized  weight float8_e4m3fn [N, K], weight_scale [N, 1], [1], or one per block

Packed codes are the signed ones plus half the range. A code stands for (code - zero point) * scale. The config's groups
say which modules are quantized and how; activations are rounded as they say, with symmetric codes.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.errors import SourceError
from graphwright.interchange.layer import Layer, columns_of, storage_group
from graphwright.interchange.packed import InputRounding, Packed
from graphwright.interchange.words import stored, stored_zero, unpack_words

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Group:
    """One group of the config, checked: which modules, and how their weights and inputs are stored."""

    targets: tuple[str, ...]
    format: str
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    inputs: dict[str, Any] | None


class CompressedTensors:
    """The method `compressed-tensors`.

    Raises:
        SourceError: a format, width, strategy or rounding that is not read.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.where = where
        self.notes: list[str] = []
        for key in ("sparsity_config", "transform_config"):
            if set(config.get(key) or {}) - {"format"} or (config.get(key) or {}).get("format", "dense") != "dense":
                raise self._refuse(f"The checkpoint has a {key}, which is not read")
        if config.get("kv_cache_scheme"):
            self.notes.append("the checkpoint's rounding of the key-value cache is left out")
        self.ignore = tuple(config.get("ignore") or ())
        groups = config.get("config_groups") or {}
        self.groups = [self._group(name, data, config.get("format")) for name, data in groups.items()]
        if not self.groups:
            raise self._refuse("The checkpoint names no config_groups, so no layer is quantized")
        self.summary = "compressed-tensors, " + ", ".join(dict.fromkeys(_words(group) for group in self.groups))

    def packed(self, layer: Layer) -> Packed | None:
        """The layer's codes, or None."""
        if layer.get("weight_scale") is None and layer.get("weight_packed") is None:
            return None
        group = self._group_of(layer)
        if group.floating:
            return self._floats(layer, group)
        return self._integers(layer, group)

    def _group_of(self, layer: Layer) -> Group:
        if any(_matches(layer, entry) for entry in self.ignore):
            raise layer.wrong(f"{layer.name} is among the layers that the config ignores, and holds codes")
        for group in self.groups:
            if any(_matches(layer, entry) for entry in group.targets):
                return group
        raise layer.wrong(f"{layer.name} holds codes, and no group of the config says how they are stored")

    def _integers(self, layer: Layer, group: Group) -> Packed:
        rows, width = layer.shape
        bits, middle = group.bits, 1 << (group.bits - 1)
        group_size = storage_group(group.group_size if group.strategy == "group" else 0, width, bits)
        groups = -(-width // group_size)
        if group.format == PACKED:
            codes = _unpacked(layer, "weight_packed", rows, width, bits)
        else:
            signed = layer.require("weight", (rows, width), torch.int8)
            codes = (signed.to(torch.int16) + middle).to(torch.uint8)
        self._check_shape(layer)
        zero = None if group.symmetric else self._zero_points(layer, group, groups)
        columns = self._columns(layer, group_size)
        weight, format = stored(codes if columns is None else codes[:, columns], bits, group_size)
        scale = self._scales(layer, group, groups)
        points = None if zero is None else stored_zero(zero, bits)
        return Packed(weight, scale, points, format, group_size, width, columns, self._rounding(layer, group))

    def _floats(self, layer: Layer, group: Group) -> Packed:
        rows, width = layer.shape
        codes = layer.require("weight", (rows, width), torch.float8_e4m3fn).view(torch.uint8)
        whole = group.strategy in ("tensor", "channel")
        group_size = width if whole else group.block[1] if group.strategy == "block" else group.group_size
        groups = -(-width // group_size)
        scale = self._scales(layer, group, groups)
        codes = torch.nn.functional.pad(codes, (0, groups * group_size - width))
        return Packed(codes, scale, None, "fp8_e4m3", group_size, width, None, self._rounding(layer, group))

    def _scales(self, layer: Layer, group: Group, groups: int) -> Tensor:
        """Scales [N, G]."""
        rows = layer.shape[0]
        if group.strategy == "tensor":
            found = layer.get("weight_scale")
            shape = () if found is not None and found.dim() == 0 else (1,)
            return layer.scales("weight_scale", shape).reshape(1, 1).expand(rows, 1).contiguous()
        if group.strategy == "block":
            height = group.block[0]
            return layer.scales("weight_scale", (-(-rows // height), groups)).repeat_interleave(height, 0)[:rows]
        found = layer.get("weight_scale")
        flat = group.strategy == "channel" and found is not None and found.dim() == 1
        return layer.scales("weight_scale", (rows,) if flat else (rows, groups)).reshape(rows, groups)

    def _zero_points(self, layer: Layer, group: Group, groups: int) -> Tensor:
        """Unsigned zero points [N, G]."""
        rows, bits = layer.shape[0], group.bits
        if group.format == PACKED:
            return _unpacked(layer, "weight_zero_point", rows, groups, bits, axis=0)
        signed = layer.require("weight_zero_point", (rows, groups), torch.int8)
        return (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)

    def _columns(self, layer: Layer, group_size: int) -> Tensor | None:
        if layer.get("weight_g_idx") is None:
            return None
        groups = layer.require("weight_g_idx", (layer.shape[1],), torch.int32, torch.int64)
        # Written but unused, it is all -1.
        return None if bool((groups < 0).all()) else columns_of(groups, group_size, layer)

    def _check_shape(self, layer: Layer) -> None:
        written = layer.get("weight_shape")
        if written is not None and tuple(written.tolist()) != layer.shape:
            raise layer.wrong(
                f"{layer.name}.weight_shape says {written.tolist()}, and the model has {list(layer.shape)}"
            )

    def _rounding(self, layer: Layer, group: Group) -> InputRounding | None:
        inputs = group.inputs
        if inputs is None:
            return None
        format = "fp8_e4m3" if inputs["type"] == "float" else f"int{inputs['num_bits']}"
        if inputs["dynamic"]:
            return InputRounding(format, None, inputs["group_size"] or 0 if inputs["strategy"] == "group" else 0)
        found = layer.get("input_scale")
        scale = layer.scales("input_scale", () if found is not None and found.dim() == 0 else (1,))
        return InputRounding(format, scale.float().reshape(()))

    def _group(self, name: str, data: Any, overall: str | None) -> Group:
        if not isinstance(data, dict):
            raise self._refuse(f"Group {name} of the config is a preset's list of targets, not a scheme")
        weights, format = data.get("weights"), data.get("format") or overall
        if not weights:
            raise self._refuse(f"Group {name} of the config quantizes no weights")
        if format not in FORMATS:
            raise self._refuse(f"Weights of the format {format} are not read", f"Read are {', '.join(FORMATS)}")
        bits, floating = weights.get("num_bits", 8), weights.get("type", "int") == "float"
        group_size = weights.get("group_size")
        strategy = weights.get("strategy") or ("group" if (group_size or -1) > 0 else "channel")
        symmetric = bool(weights.get("symmetric", True))
        if not (bits == 8 and symmetric if floating else 2 <= bits <= 8):
            kind = "floating-point" if floating else "integer"
            raise self._refuse(f"Weights in {bits}-bit {kind} codes are not read")
        if strategy not in STRATEGIES or (strategy == "block" and not floating):
            raise self._refuse(f"Scales by the strategy {strategy} are not read")
        if data.get("output_activations"):
            raise self._refuse(f"Group {name} of the config rounds the outputs of layers, which is not read")
        block = tuple(weights.get("block_structure") or (0, 0))
        inputs = self._inputs(name, data.get("input_activations"))
        targets = tuple(data.get("targets") or ())
        return Group(targets, format, bits, floating, symmetric, strategy, int(group_size or 0), block, inputs)

    def _inputs(self, name: str, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if not given:
            return None
        read = {"type": "int", "num_bits": 8, "dynamic": False, "symmetric": True, "group_size": None, **given}
        read["strategy"] = read.get("strategy") or ("token" if read["dynamic"] else "tensor")
        known = ("token", "group", "tensor") if read["dynamic"] is True else ("tensor",)
        if read["type"] == "float" and read["num_bits"] != 8:
            raise self._refuse(f"Group {name} rounds activations to {read['num_bits']}-bit floats, which are not read")
        whole_tensor = read["dynamic"] and read["strategy"] == "tensor"
        if not read["symmetric"] or read["strategy"] not in known or whole_tensor or read["num_bits"] not in (4, 8):
            raise self._refuse(
                f"Group {name} of the config rounds activations in a way that is not read",
                "Read are symmetric codes of 8 bits: dynamic per token or group, or static per tensor",
            )
        return read

    def _refuse(
        self, problem: str, fix: str = "Compile the original model with a recipe of Graphwright's"
    ) -> SourceError:
        return SourceError(problem, where=self.where, fix=fix)


def _unpacked(layer: Layer, part: str, rows: int, count: int, bits: int, axis: int = 1) -> Tensor:
    """Unsigned codes [rows, count], packed along `axis`; before 0.18 the package let no code cross a word."""
    size, per_word = (rows, count)[axis], 32 // bits
    shapes = [(rows, words) if axis else (words, count) for words in (-(-size * bits // 32), -(-size // per_word))]
    found = layer.get(part)
    within = 32 % bits != 0 and found is not None and tuple(found.shape) == shapes[1]
    words = layer.require(part, shapes[within], torch.int32)
    words = words if axis else words.t()
    if within:
        codes = unpack_words(words.reshape(-1, 1), bits, per_word).reshape(words.shape[0], -1)[:, :size]
    else:
        codes = unpack_words(words, bits, size)
    return codes if axis else codes.t().contiguous()


def _matches(layer: Layer, entry: str) -> bool:
    """Whether an entry of targets or ignore means the layer."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), layer.name) is not None
    return entry in (layer.name, layer.kind)


def _words(group: Group) -> str:
    spread = {"group": f"in groups of {group.group_size}", "channel": "per row", "tensor": "per tensor"}
    kind = "fp8" if group.floating else f"{group.bits} bits"
    inputs = ", activations rounded" if group.inputs else ""
    return f"{kind} {spread.get(group.strategy, f'per block of {group.block}')}{inputs}"
