"""Converters of our ops for `torch_tensorrt.dynamo`, registered when this module is imported.

- quantized_linear: a product with DequantizeLinear's layer over int8 or FP8 rows or int4 blocks.
- quantized_embedding: rows of a table that is dequantized by such a layer.
- quantize_dequantize with a scale: TensorRT's quantize and dequantize layers.
- attention with one bias: TensorRT's attention layer, whose kernels are fused.
- ATen's gather, which picks the positions whose logits are wanted: torch_tensorrt converts it for fixed sizes only.

They take what `handover` makes of a program: symmetric weights, whole groups, and positions turned into a bias. A node
in another form has no converter, and `refusal` says why.
"""

from collections.abc import Mapping
from typing import Any

import tensorrt as trt
import torch
from torch import Tensor, fx
from torch_tensorrt.dynamo.conversion import ConversionContext, dynamo_tensorrt_converter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

from graphwright import ops, packing
from graphwright.backends.tensorrt.takes import FORMATS, ROUNDED, has_kernel
from graphwright.match import argument
from graphwright.text import op_name

CODES = {"int8": trt.DataType.INT8, "int4": trt.DataType.INT4, "fp8_e4m3": trt.DataType.FP8}

DTYPES = {
    torch.float32: trt.DataType.FLOAT,
    torch.float16: trt.DataType.HALF,
    torch.bfloat16: trt.DataType.BF16,
    torch.int64: trt.DataType.INT64,
    torch.int32: trt.DataType.INT32,
    torch.bool: trt.DataType.BOOL,
}


def refusal(node: fx.Node) -> str:
    """Why a node over one of our ops has no form in an engine; empty if it has one."""
    if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
        format = str(argument(node, "format"))
        if format not in FORMATS:
            return f"TensorRT has no weights of format {format}"
        constant = all(argument(node, name).op == "get_attr" for name in ("weight", "scale"))
        return "" if constant and argument(node, "zero_point") is None else "its weight is not a symmetric constant"
    if node.target is ops.quantize_dequantize.target:
        static = argument(node, "scale") is not None and argument(node, "format") in ROUNDED
        return "" if static else "TensorRT rounds to int8 and FP8 codes, with one scale"
    if node.target is ops.attention.target:
        return "" if has_kernel(node) else "TensorRT has no attention kernel for it"
    return f"TensorRT has no form of {op_name(node.target)}"


def _takes(node: fx.Node, _settings: Any = None) -> bool:
    return not refusal(node)


Arguments = tuple[Any, ...]


def converter(target: Any, validator: Any = _takes) -> Any:
    """Registers a function (network builder's context, node, values of the arguments, name) as an op's converter."""

    def register(write: Any) -> Any:
        @dynamo_tensorrt_converter(target, capability_validator=validator, supports_dynamic_shapes=True)
        def convert(ctx: ConversionContext, target: Any, args: Arguments, kwargs: Mapping[str, Any], name: str) -> Any:
            names = [one.name for one in target._schema.arguments]
            return write(ctx, ctx.current_node, dict(zip(names, args, strict=False)) | dict(kwargs), name)

        return write

    return register


@converter(ops.quantized_linear.target)
def quantized_linear(ctx: ConversionContext, node: fx.Node, given: Mapping[str, Any], name: str) -> Any:
    """A matrix product with the dequantized weight."""
    x = get_trt_tensor(ctx, given["x"], f"{name}_x")
    dense = dequantized(ctx, given, node.meta["val"].dtype, name)
    for axes in range(len(x.shape) - 2):
        layer = ctx.net.add_shuffle(dense)
        layer.reshape_dims = (1, *dense.shape)
        layer.name = f"{name}_rank_{axes}"
        dense = layer.get_output(0)
    product = ctx.net.add_matrix_multiply(x, trt.MatrixOperation.NONE, dense, trt.MatrixOperation.TRANSPOSE)
    product.name = name
    return product.get_output(0)


@converter(ops.quantized_embedding.target)
def quantized_embedding(ctx: ConversionContext, node: fx.Node, given: Mapping[str, Any], name: str) -> Any:
    """Rows of the dequantized table."""
    dense = dequantized(ctx, given, node.meta["val"].dtype, name)
    rows = ctx.net.add_gather(dense, get_trt_tensor(ctx, given["indices"], f"{name}_indices"), 0)
    rows.name = name
    return rows.get_output(0)


@converter(ops.quantize_dequantize.target)
def quantize_dequantize(ctx: ConversionContext, node: fx.Node, given: Mapping[str, Any], name: str) -> Any:
    """Codes, and numbers again, in the dtype of the activations."""
    dtype = node.meta["val"].dtype
    scale = _constant(ctx, given["scale"].to(dtype).reshape(()), f"{name}_scale")
    codes = ctx.net.add_quantize(given["x"], scale, CODES[given["format"]])
    codes.name = f"{name}_quantize"
    numbers = ctx.net.add_dequantize(codes.get_output(0), scale, DTYPES[dtype])
    numbers.name = f"{name}_dequantize"
    return numbers.get_output(0)


@converter(ops.attention.target)
def attention(ctx: ConversionContext, node: fx.Node, given: Mapping[str, Any], name: str) -> Any:
    """TensorRT's attention layer over a scaled query; grouped heads are its own."""
    scale = torch.full((1, 1, 1, 1), float(given["scale"]), dtype=node.meta["val"].dtype)
    factor = _constant(ctx, scale, f"{name}_scale")
    query = ctx.net.add_elementwise(given["query"], factor, trt.ElementWiseOperation.PROD)
    query.name = f"{name}_scaled"
    layer = ctx.net.add_attention(
        query.get_output(0), given["key"], given["value"], trt.AttentionNormalizationOp.SOFTMAX, False
    )
    layer.name = name
    layer.decomposable = True
    layer.mask = get_trt_tensor(ctx, given["bias"], f"{name}_bias")
    return layer.get_output(0)


@converter(torch.ops.aten.gather.default, None)
def gather(ctx: ConversionContext, node: fx.Node, given: Mapping[str, Any], name: str) -> Any:
    """Single elements along one dimension."""
    values = get_trt_tensor(ctx, given["self"], f"{name}_values")
    layer = ctx.net.add_gather_v2(values, get_trt_tensor(ctx, given["index"], f"{name}_index"), trt.GatherMode.ELEMENT)
    layer.axis = given["dim"] % len(values.shape)
    layer.name = name
    return layer.get_output(0)


def dequantized(ctx: ConversionContext, given: Mapping[str, Any], dtype: torch.dtype, name: str) -> Any:
    """The weight [N, K] through a dequantize layer over its codes."""
    format, group_size = given["format"], int(given["group_size"])
    kind, scale = packing.FORMATS[format], given["scale"].cpu().to(dtype)
    codes = packing.unpack(given["weight"].cpu(), format, group_size)
    rows = scale.shape[1] == 1 and kind.bits == 8
    stored = _codes(ctx, codes, format, f"{name}_codes")
    scales = _constant(ctx, scale.reshape(-1) if rows else scale, f"{name}_weight_scale")
    layer = ctx.net.add_dequantize(stored, scales, DTYPES[dtype])
    if rows:
        layer.axis = 0
    layer.name = f"{name}_dequantize"
    return layer.get_output(0)


def _codes(ctx: ConversionContext, codes: Tensor, format: str, name: str) -> Any:
    """Codes [N, K] as a constant of TensorRT's own type; those of 4 bits lie two to a byte, the first one low."""
    kind = packing.FORMATS[format]
    if kind.dtype is not None:
        held = codes.view(torch.uint8)
    elif kind.bits == 4:
        pairs = ((codes.to(torch.int16) - kind.zero) & 15).to(torch.uint8).unflatten(-1, (-1, 2))
        held = pairs[..., 0] | (pairs[..., 1] << 4)
    else:
        held = (codes.to(torch.int16) - kind.zero).to(torch.int8)
    return _weights(ctx, held.contiguous(), CODES[format], tuple(codes.shape), name)


def _constant(ctx: ConversionContext, tensor: Tensor, name: str) -> Any:
    held = tensor.detach().cpu().contiguous()
    return _weights(ctx, held, DTYPES[held.dtype], tuple(held.shape), name)


def _weights(ctx: ConversionContext, held: Tensor, dtype: Any, shape: tuple[int, ...], name: str) -> Any:
    """A constant over memory that the context keeps until the engine is built."""
    ctx.cpu_weights_reference_holder.append(held)
    count = 1
    for size in shape:
        count *= size
    layer = ctx.net.add_constant(shape, trt.Weights(dtype, held.data_ptr(), count))
    layer.name = name
    return layer.get_output(0)
