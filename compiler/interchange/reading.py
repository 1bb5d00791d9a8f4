"""Models of `transformers` whose weights are quantized, from the file or directory that holds them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.interchange.directory import QuantizedDirectory
from graphwright.interchange.gguf import open_gguf
from graphwright.interchange.skeleton import fill, skeleton

AGAIN = "its weights are quantized already ({}): they were dequantized, and what the recipe rounds is rounded again"
KEPT = "its codes are kept ({})"
FEW_BITS = 15
"""A file with fewer bits than this per parameter holds blocks of codes; float16 takes sixteen."""


def read_directory(
    transformers: Any, model_class: Any, config: Any, folder: Path, dtype: torch.dtype, *, keep_codes: bool
) -> tuple[nn.Module, list[str]]:
    """The model of a directory whose config names a quantization method, and notes on the reading.

    Raises:
        SourceError: the method or one of its options is not read, or tensors are missing or do not fit.
    """
    model = skeleton(model_class, config, dtype)
    checkpoint = QuantizedDirectory(folder, dict(config.quantization_config), model)
    notes = fill(model, checkpoint, dtype, keep_codes=keep_codes)
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, [(KEPT if keep_codes else AGAIN).format(checkpoint.summary), *notes]


def read_gguf(model_class: Any, config: Any, file: Path, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """The model of a GGUF file with its codes, and notes on the reading.

    Raises:
        SourceError: tensors are missing or do not fit.
    """
    model = skeleton(model_class, config, dtype)
    checkpoint = open_gguf(str(file), model, config)
    notes = fill(model, checkpoint, dtype, keep_codes=True)
    return model, [KEPT.format(checkpoint.summary), *notes]


def gguf_notes(model: nn.Module, file: Path) -> list[str]:
    """What a user should know of a GGUF file that was read in floating point."""
    bits = file.stat().st_size * 8 / max(1, sum(parameter.numel() for parameter in model.parameters()))
    return [AGAIN.format(f"gguf, {bits:.1f} bits each")] if bits < FEW_BITS else []
