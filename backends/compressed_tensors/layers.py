"""One quantized layer of a program as the tensors and the scheme of the format.

    codes of 2, 4 and 8 bits               pack-quantized    weight_packed, weight_scale, weight_shape, …
    codes of 8 bits, activations rounded   int-quantized     weight (int8), weight_scale, …
    fp8                                    float-quantized   weight (float8_e4m3fn), weight_scale

Codes are stored as they are, so that reading gives back the same ones; scales become floating point of the directory's
dtype. Codes of 3 bits are packed in another way by every few versions of the package, so they are not written.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import ops, packing
from graphwright.errors import BackendError
from graphwright.interchange.words import pack_words
from graphwright.match import argument
from graphwright.program import Program

CARRIED = ("int2", "int4", "int8", "fp8_e4m3")
"""Weight formats that have a form."""


@dataclass(frozen=True)
class Written:
    """A layer in the format.

    Attributes:
        module: its name.
        tensors: by their names within the module.
        scheme: how they are stored: a group of the config, without its targets.
    """

    module: str
    tensors: dict[str, Tensor]
    scheme: dict[str, Any]


def write_layer(program: Program, node: fx.Node, dtype: torch.dtype) -> Written:
    """The layer of a call of `quantized_linear`; `dtype` is that of scales.

    Raises:
        BackendError: its codes have no form, or its groups do not fill the weight's rows.
    """
    name = str(argument(node, "weight").target)
    points = argument(node, "zero_point")
    held = Held(
        program.weight(name),
        program.weight(argument(node, "scale")),
        None if points is None else program.weight(points),
        str(argument(node, "format")),
        int(argument(node, "group_size")),
        int(argument(node, "x").meta["val"].shape[-1]),
    )
    inputs, scales = _inputs(program, node, dtype)
    made = write_weight(name.rpartition(".")[0], held, inputs, dtype)
    return Written(made.module, made.tensors | scales, made.scheme)


@dataclass(frozen=True)
class Held:
    """A weight [N, K = `width`] in the layout of `graphwright.packing`, as `quantized_linear` takes it."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    format: str
    group_size: int
    width: int


def write_weight(module: str, held: Held, inputs: dict[str, Any] | None, dtype: torch.dtype) -> Written:
    """One weight; `inputs` is how what it multiplies with is rounded.

    Raises:
        BackendError: its codes have no form, or its groups do not fill the weight's rows.
    """
    format, group_size, width, zero = held.format, held.group_size, held.width, held.zero
    fractional = zero is not None and zero.is_floating_point()
    if format not in CARRIED or fractional:
        kind = f"{format} codes with fractional zero points" if fractional and format in CARRIED else f"{format} codes"
        raise BackendError(f"{module} holds {kind}, and compressed-tensors carries {', '.join(CARRIED)}")
    whole = held.scale.shape[1] == 1 and group_size >= width
    if not whole and width % group_size:
        raise BackendError(
            f"{module} reads {width} channels, which groups of {group_size} do not divide",
            fix="Choose a group size that divides every layer's width, or keep that layer with the option layers",
        )
    codes = packing.unpack(held.packed, format, group_size)[:, :width]
    scheme = _scheme(format, 0 if whole else group_size, zero is None, inputs)
    tensors = _codes(codes, zero, format, scheme["format"])
    return Written(module, {**tensors, "weight_scale": held.scale.to(dtype)}, scheme)


def _codes(codes: Tensor, zero: Tensor | None, format: str, form: str) -> dict[str, Tensor]:
    if form == "float-quantized":
        return {"weight": codes.contiguous().view(torch.float8_e4m3fn)}
    if form == "int-quantized":
        return {"weight": codes.contiguous(), **({} if zero is None else {"weight_zero_point": zero})}
    bits, low = packing.FORMATS[format].bits, packing.FORMATS[format].low
    made = {
        "weight_packed": pack_words(codes.to(torch.int16) - low, bits),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        made["weight_zero_point"] = pack_words((zero.to(torch.int16) - low).t(), bits).t().contiguous()
    return made


def _scheme(format: str, group_size: int, symmetric: bool, inputs: dict[str, Any] | None) -> dict[str, Any]:
    floating, bits = format.startswith("fp8"), packing.FORMATS[format].bits
    weights = {
        "num_bits": bits,
        "type": "float" if floating else "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "dynamic": False,
    }
    form = "float-quantized" if floating else "int-quantized" if inputs and bits == 8 else "pack-quantized"
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": form}


def _inputs(program: Program, node: fx.Node, dtype: torch.dtype) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """How the layer rounds what it reads, and the scale of a static rounding."""
    source = argument(node, "x")
    if source.target != ops.quantize_dequantize.target:
        return None, {}
    format, group_size, scale = (argument(source, name) for name in ("format", "group_size", "scale"))
    floating = str(format).startswith("fp8")
    strategy = "tensor" if scale is not None else "group" if group_size else "token"
    inputs = {
        "num_bits": packing.FORMATS[str(format)].bits,
        "type": "float" if floating else "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": int(group_size) or None,
        "dynamic": scale is None,
    }
    return inputs, {} if scale is None else {"input_scale": program.weight(scale).reshape(1).to(dtype)}
