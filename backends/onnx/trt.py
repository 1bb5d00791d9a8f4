"""What TensorRT's parser takes for our ops where the plain forms are refused or lose their fusion.

- Weights: DequantizeLinear over int8 or FP8 rows and int4 blocks of a row, in the dtype of the activations. TensorRT
  has no zero points: with one, the product is that of codes around zero plus a small product of the sums of each group
  with what the zero points add, which is the same number.
- Activations rounded per token: QuantizeLinear and DequantizeLinear with a scale of one around x / step, and the step
  multiplied back after the product, so that the product itself is over codes.
- Attention: the operator of opset 24 where TensorRT has a kernel for it, else the plain form.
- Caches in place: read through a scatter of the new entries; the new entries themselves are outputs, and who runs the
  engine writes them. TensorRT's own cache layer takes a fixed length only.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright import ops, packing
from graphwright.backends.onnx import quantized, semantic
from graphwright.backends.onnx.quantized import zeros
from graphwright.backends.onnx.translate import OfNode, Translator, onnx_dtype
from graphwright.backends.tensorrt.takes import FORMATS, ROUNDED, has_kernel, on_codes, per_token
from graphwright.match import argument
from graphwright.ops.quantize_dequantize import LARGEST

FLOAT, INT4, INT64 = ir.DataType.FLOAT, ir.DataType.INT4, ir.DataType.INT64


def dense_weight(t: Translator, node: fx.Node) -> tuple[ir.Value, ir.Value | None, int]:
    """Codes times scales [N, G * group_size], what zero points add per group [N, G], and the group size."""
    weight, scale, zero_point = (t.tensor(argument(node, name)) for name in ("weight", "scale", "zero_point"))
    format, group_size = argument(node, "format"), int(argument(node, "group_size"))
    assert weight is not None and scale is not None  # noqa: S101, PT018
    b, name, kind = t.builder, str(argument(node, "weight").target), packing.FORMATS[format]
    torch_dtype = node.meta["val"].dtype
    dtype = onnx_dtype(torch_dtype)
    outputs, groups = scale.shape
    codes = packing.unpack(weight, format, group_size)

    def make() -> tuple[ir.Value, ir.Value | None]:
        if kind.dtype is not None:
            stored = b.weight(f"{name}_codes", codes.view(kind.dtype))
        elif kind.bits == 4:
            pairs = ((codes.to(torch.int16) - kind.zero) & 15).to(torch.uint8).unflatten(-1, (-1, 2))
            stored = b.weight(f"{name}_codes", pairs[..., 0] | (pairs[..., 1] << 4), INT4)
        else:
            stored = b.weight(f"{name}_codes", (codes.to(torch.int16) - kind.zero).to(torch.int8))
        narrow = scale.to(torch_dtype)
        if groups == 1 and kind.bits == 8:
            dense = b("DequantizeLinear", stored, b.weight(f"{name}_scale", narrow.reshape(-1)), axis=0)
        else:
            scales = b.weight(f"{name}_scale", narrow)
            dense = b("DequantizeLinear", stored, scales, axis=1, block_size=group_size)
        points = None if zero_point is None else zeros(zero_point, scale, format).float() - kind.zero
        if points is None or not points.any():
            return t.shaped(dense, dtype, [outputs, groups * group_size]), None
        added = b.weight(f"{name}_added", (-points * scale.float()).to(torch_dtype))
        return t.shaped(dense, dtype, [outputs, groups * group_size]), added

    made: tuple[ir.Value, ir.Value | None] = t.shared_value(("dense", name, dtype), make)
    return (*made, group_size)


def quantized_linear(t: Translator, node: fx.Node) -> ir.Value:
    """A product over codes, of weights and, where those are rounded per token, of activations."""
    if argument(node, "format") not in FORMATS:
        return quantized.quantized_linear(t, node)
    b, given = t.builder, node.args[0]
    features = int(given.meta["val"].shape[-1])
    dense, added, group_size = dense_weight(t, node)
    width = int(dense.shape[1])
    step = None
    if on_codes(node):
        x, step = _rounded(t, given)
    else:
        x = t.value(given)
    if width != features:
        # Codes stay whole, so that the weight stays quantized: the activations grow instead.
        rank = given.meta["val"].dim()
        x = b("Pad", x, b.ints([0] * (2 * rank - 1) + [width - features]))
    product = b("MatMul", x, b("Transpose", dense, perm=[1, 0]))
    if added is not None:
        sums = t.shared_value(("sums", x, group_size), lambda: _sums(t, x, group_size, width // group_size))
        product = b("Add", product, b("MatMul", sums, b("Transpose", added, perm=[1, 0])))
    if step is not None:
        product = b("Mul", product, step)
    bias = argument(node, "bias")
    return product if bias is None else b("Add", product, t.value(bias))


def quantized_embedding(t: Translator, node: fx.Node) -> ir.Value:
    """Rows of the dequantized table: TensorRT lets nothing but DequantizeLinear read codes."""
    if argument(node, "format") not in FORMATS:
        return quantized.quantized_embedding(t, node)
    b, indices = t.builder, t.value(node.args[0])
    dense, added, group_size = dense_weight(t, node)
    rows = b("Gather", dense, indices, axis=0)
    width = int(dense.shape[1])
    rank = int(node.args[0].meta["val"].dim())
    if added is not None:
        cut = b("Reshape", rows, b.ints([*[0] * rank, width // group_size, group_size]))
        more = b("Unsqueeze", b("Gather", added, indices, axis=0), b.ints([-1]))
        rows = b("Reshape", b("Add", cut, more), b.ints([*[0] * rank, width]))
    wanted = int(argument(node, "embedding_dim"))
    return rows if wanted == width else b("Slice", rows, b.ints([0]), b.ints([wanted]), b.ints([-1]))


def _sums(t: Translator, x: ir.Value, group_size: int, groups: int) -> ir.Value:
    """Sums of the activations of each group, [..., G]."""
    b = t.builder
    leading = b("Shape", x, start=0, end=-1)
    cut = b("Reshape", x, b("Concat", leading, b.ints([groups, group_size]), axis=0))
    return b("ReduceSum", cut, b.ints([-1]), keepdims=0)


def _rounded(t: Translator, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Codes as numbers, and the step [..., 1] that they are multiples of, in the dtype of the activations."""

    def make() -> tuple[ir.Value, ir.Value]:
        b, x = t.builder, t.value(node.args[0])
        format, dtype = argument(node, "format"), onnx_dtype(node.meta["val"].dtype)
        wide = x if dtype == FLOAT else b("Cast", x, to=FLOAT)
        most = b("ReduceMax", b("Abs", wide), b.ints([-1]), keepdims=1)
        step = b("Max", b("Div", most, b.scalar(LARGEST[format], FLOAT)), b.scalar(1e-30, FLOAT))
        narrow = b("Cast", step, to=dtype) if dtype != FLOAT else step
        scaled = b("Div", wide, step)
        if dtype != FLOAT:
            scaled = b("Cast", scaled, to=dtype)
        return _through_codes(t, scaled, format, b.scalar(1.0, dtype)), narrow

    made: tuple[ir.Value, ir.Value] = t.shared_value(("rounded", node), make)
    return made


def _through_codes(t: Translator, x: ir.Value, format: str, scale: ir.Value) -> ir.Value:
    zero = t.builder.weight(f"zero_{format}", torch.zeros((), dtype=ROUNDED[format]))
    return t.builder("DequantizeLinear", t.builder("QuantizeLinear", x, scale, zero), scale, zero)


def quantize_dequantize(t: Translator, node: fx.Node) -> ir.Value | None:
    """QuantizeLinear and DequantizeLinear; left to the products that read it, if all of them multiply codes."""
    if per_token(node):
        if all(map(on_codes, node.users)):
            return None
        codes, step = _rounded(t, node)
        return t.builder("Mul", codes, step)
    format, scale = argument(node, "format"), argument(node, "scale")
    if format not in ROUNDED or scale is None:
        return semantic.quantize_dequantize(t, node)
    value = t.tensor(scale)
    assert value is not None  # noqa: S101
    dtype = node.meta["val"].dtype
    step = t.builder.weight(f"{scale.target}_{dtype}".replace("torch.", ""), value.to(dtype).reshape(()))
    return _through_codes(t, t.value(node.args[0]), format, step)


def attention(t: Translator, node: fx.Node) -> ir.Value:
    """The operator Attention, or the plain form."""
    if not has_kernel(node):
        return semantic.attention(t, node)
    dtype = onnx_dtype(node.meta["val"].dtype)
    mask = semantic.mask(t, node)
    narrow = t.shared_value(("narrow mask", mask, dtype), lambda: semantic.narrow_mask(t, mask, dtype))
    operands = (t.value(node.args[i]) for i in range(3))
    return t.builder("Attention", *operands, narrow, scale=float(argument(node, "scale")))


def kv_cache_update(t: Translator, node: fx.Node) -> None:
    """The cache as later reads see it; the new entries and their slots become outputs of the graph."""
    b = t.builder
    cache, new, slots = node.args[:3]
    name, held, entries, places = str(cache.target), t.value(cache), t.value(new), t.value(slots)
    capacity = b("Sub", b("Shape", held, start=2, end=3), b.ints([1]))

    def make() -> ir.Value:
        written = b("Where", b("Less", places, b.scalar(0, INT64)), capacity, places)
        return b("Unsqueeze", written, b.ints([1, 3]))

    index = t.shared_value(("slots", places), make)
    t.values[cache] = b("ScatterElements", held, b("Expand", index, b("Shape", entries)), entries, axis=2)
    t.typed(t.values[cache], cache.meta["val"])
    for part, value, source in (("new", entries, new), ("slots", places, slots)):
        copy = t.typed(b("Identity", value), source.meta["val"])
        copy.name = f"{name}.{part}"
        t.extra_outputs.append(copy)


TENSORRT: dict[Any, OfNode] = {
    ops.attention.target: OfNode(attention),
    ops.quantized_linear.target: OfNode(quantized_linear),
    ops.quantized_embedding.target: OfNode(quantized_embedding),
    ops.quantize_dequantize.target: OfNode(quantize_dequantize),
    ops.kv_cache_update.target: OfNode(kv_cache_update),
}
"""Translations that TensorRT's parser takes."""
