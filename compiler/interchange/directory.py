"""A Hugging Face directory of quantized weights: its safetensors files, and the method that its config names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from graphwright.errors import SourceError
from graphwright.interchange.awq import Awq
from graphwright.interchange.compressed_tensors import CompressedTensors
from graphwright.interchange.gptq import Gptq
from graphwright.interchange.layer import Layer, Method
from graphwright.interchange.names import Names
from graphwright.interchange.packed import Packed

METHODS: dict[str, type[Any]] = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors}
"""Readers by the config's `quant_method`."""

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
CODES = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_zero_point")
"""Endings of names that only quantized layers have."""


class QuantizedDirectory:
    """The weights of a directory.

    Args:
        folder: with safetensors files.
        config: the `quantization_config` of its config.json.
        model: whose weights they are; it may have none.

    Raises:
        SourceError: the method is not read, or files are missing.
    """

    def __init__(self, folder: Path, config: dict[str, Any], model: nn.Module) -> None:
        self.where = str(folder)
        name = config.get("quant_method")
        if name not in METHODS:
            raise SourceError(
                f"The weights are quantized already, by {name or 'a method without a name'}, which is not read",
                where=self.where,
                fix=f"Read are {', '.join(METHODS)}; or give the original model in float",
            )
        self.method: Method = METHODS[name](config, self.where)
        self.summary = self.method.summary
        self._files = _files(folder)
        self._names = Names(model, self._files)
        self._open: dict[Path, Any] = {}
        self._asked: set[str] = set()
        self._unrounded = 0

    @property
    def notes(self) -> list[str]:
        """What is read in another way than the checkpoint says."""
        left_out = f"{self._unrounded} layers of experts read their inputs as they are, which the checkpoint rounds"
        return [*self.method.notes, *([left_out] if self._unrounded else [])]

    def is_float(self, name: str) -> bool:
        """Whether there is a tensor of this name in floating point."""
        found = self.find(name)
        return found is not None and found.is_floating_point() and found.dtype != torch.float8_e4m3fn

    def find(self, name: str) -> Tensor | None:
        """The tensor of this name, mapped from its file, or None."""
        name = self._names.stored(name)
        file = self._files.get(name)
        if file is None:
            return None
        self._asked.add(name)
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def packed(self, name: str, kind: str, shape: tuple[int, int]) -> Packed | None:
        """The weight of the module `name` in codes, or None if it is stored in floating point."""
        return self.method.packed(Layer(name, kind, shape, self.find, self.where))

    def experts(self, name: str, shape: tuple[int, ...]) -> list[list[Packed | Tensor]] | None:
        """The layers whose weights the parameter `name` [E, N, K] holds: by part of the rows, and by expert.

        Raises:
            SourceError: some are missing, or their tensors do not go together.
        """
        parts = self._names.stacks.get(name)
        if parts is None:
            return None
        count, (rows, width) = shape[0], (shape[1] // len(parts), shape[2])
        for layers in parts:
            if len(layers) != count:
                raise SourceError(
                    f"The checkpoint holds {len(layers)} layers such as {(layers or ['none'])[0]}, and {name} is made "
                    f"of {count}",
                    where=self.where,
                    fix="Download it again; or its config.json belongs to another model",
                )
        return [[self._expert(layer, (rows, width)) for layer in layers] for layers in parts]

    def _expert(self, name: str, shape: tuple[int, int]) -> Packed | Tensor:
        layer = Layer(name, "Linear", shape, self.find, self.where)
        bias = layer.get("bias")
        if bias is not None and bool(bias.any()):
            raise layer.wrong(f"{name}.bias holds values, and the model's experts add none")
        found = self.method.packed(layer)
        if found is None:
            return layer.require("weight", shape, torch.float16, torch.bfloat16, torch.float32)
        self._unrounded += found.rounding is not None
        return found

    def unread(self) -> list[str]:
        """Names of codes that no module of the model asked for."""
        return sorted(name for name in self._files if name.endswith(CODES) and name not in self._asked)


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index = folder / INDEX
    if index.is_file():
        found = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        missing = sorted({file.name for file in found.values() if not file.is_file()})
        if missing:
            raise SourceError(f"The weights lack the file {missing[0]}", where=str(folder), fix="Download it again")
        return found
    files = sorted(folder.glob("*.safetensors"))
    if (folder / ONE_FILE) in files:
        files = [folder / ONE_FILE]
    if len(files) != 1:
        held = "several safetensors files without an index" if files else "no safetensors file"
        fix = f"Put {ONE_FILE}, or its parts with {INDEX}, beside config.json"
        raise SourceError(f"The directory of quantized weights holds {held}", where=str(folder), fix=fix)
    with safe_open(files[0], framework="pt") as opened:
        return dict.fromkeys(opened.keys(), files[0])
