"""Low-bit weights in operators of ai.onnx: DequantizeLinear in front of an ordinary product or lookup.

A weight [N, K] in G groups is stored as rows [N * G, group_size] with one scale and one zero point each, which
DequantizeLinear has read since opset 13; 4-bit codes are of type UINT4, which it has read since opset 21.

Where asked to decompose, what has no such form is written in plain operators: codes of 2 and 3 bits in 8 bits each,
codes that stand for the entries of a table as a lookup, FP8 as a cast, and sparse weights with their zeros.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from graphwright import ops, packing
from graphwright.backends.onnx.options import FOUR_BIT_OPSET
from graphwright.backends.onnx.translate import OfNode, Translator, onnx_dtype
from graphwright.match import argument
from graphwright.text import op_name


def dequantized(t: Translator, node: fx.Node) -> tuple[ir.Value, int]:
    """The float32 weight [N, G * group_size] of a quantized node, and its padded width."""
    weight, scale, zero_point = (t.tensor(argument(node, name)) for name in ("weight", "scale", "zero_point"))
    format, group_size = argument(node, "format"), argument(node, "group_size")
    name = str(argument(node, "weight").target)
    assert weight is not None and scale is not None  # noqa: S101, PT018
    outputs, groups = scale.shape

    refusal = t.options.refusal(format)
    if refusal:
        raise t.refuse(*refusal)

    def make() -> ir.Value:
        b = t.builder
        codes = packing.unpack(weight, format, group_size).reshape(outputs * groups, group_size)
        if t.options.profile == "ort" and zero_point is None and _is_table(t, node):
            return _table_rows(t, name, codes, scale.float().reshape(-1))
        rows = _rows(t, f"{name}_codes", codes, scale.float().reshape(-1), zeros(zero_point, scale, format), format)
        return rows if groups == 1 else b("Reshape", rows, b.ints([outputs, groups * group_size]))

    made: ir.Value = t.shared_value(("dequantized", name), make)
    return made, groups * group_size


def _is_table(t: Translator, node: fx.Node) -> bool:
    """Whether the weight is a token table too, which ONNX Runtime's operator reads as whole unsigned bytes."""
    whole = int(argument(node, "group_size")) == int(node.args[0].meta["val"].shape[-1])
    if argument(node, "format") != "int8" or not whole:
        return False
    name = argument(node, "weight").target
    tables = t.program.calls(ops.quantized_embedding.target)
    return any(argument(table, "weight").target == name for table in tables)


def _table_rows(t: Translator, name: str, codes: Tensor, scale: Tensor) -> ir.Value:
    """Float32 rows [N, K] over the very tensor of the token lookup: a head that is tied to it costs no bytes."""
    b = t.builder
    stored = b.weight(f"{name}_table", (codes.to(torch.int16) + 128).to(torch.uint8))
    zero = b.weight(f"{name}_table_zero", torch.full(scale.shape, 128, dtype=torch.uint8))
    return b("DequantizeLinear", stored, b.weight(f"{name}_codes_scale", scale), zero, axis=0)


def _rows(t: Translator, name: str, codes: Tensor, scale: Tensor, points: Tensor, format: str) -> ir.Value:
    """Float32 rows [R, group_size] from codes, scales [R] and zero points [N, G]."""
    b, kind = t.builder, packing.FORMATS[format]
    scales = b.weight(f"{name}_scale", scale if kind.integer and not points.is_floating_point() else scale[:, None])
    if kind.table:
        table = b.constant(list(kind.table), ir.DataType.FLOAT)
        places = b("Cast", b.weight(name, codes), to=ir.DataType.INT32)
        return b("Mul", b("Gather", table, places, axis=0), scales)
    if kind.dtype is not None:
        return b("Mul", b("Cast", b.weight(name, codes.view(kind.dtype)), to=ir.DataType.FLOAT), scales)
    stored = _stored(t, name, codes, format)
    if points.is_floating_point():
        # Zero points between codes have no place in DequantizeLinear.
        between = b.weight(f"{name}_zero", points.float().reshape(-1, 1))
        return b("Mul", b("Sub", b("Cast", stored, to=ir.DataType.FLOAT), between), scales)
    zero = _stored(t, f"{name}_zero", points.reshape(-1), format) if points.any() else None
    return b("DequantizeLinear", stored, scales, zero, axis=0)


def zeros(zero_point: Tensor | None, scale: Tensor, format: str) -> Tensor:
    """Zero points [N, G] as they are given, else the format's own code of zero."""
    if zero_point is None:
        return torch.full(scale.shape, packing.FORMATS[format].zero, dtype=packing.FORMATS[format].storage)
    if zero_point.is_floating_point() and torch.equal(zero_point, zero_point.round()):
        return zero_point.to(packing.FORMATS[format].storage)
    return zero_point


def _stored(t: Translator, name: str, codes: Tensor, format: str) -> ir.Value:
    """Codes as an initializer of the narrowest type that the opset has."""
    if packing.FORMATS[format].bits != 4 or t.options.opset < FOUR_BIT_OPSET:
        return t.builder.weight(name, codes.to(packing.FORMATS[format].storage))
    if codes.shape[-1] % 2:
        return t.builder.weight(name, codes.to(packing.FORMATS[format].storage))
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return t.builder.weight(name, pairs[..., 0] | (pairs[..., 1] << 4), ir.DataType.UINT4)


def quantized_linear(t: Translator, node: fx.Node) -> ir.Value:
    """The product with the dequantized weight; see `product`."""
    return product(t, node, *dequantized(t, node))


def whole_linear(t: Translator, node: fx.Node) -> ir.Value:
    """The product with a weight of any layout, written as one dense matrix with all of its zeros.

    Raises:
        RefusalError: this was not asked for.
    """
    if not t.options.decompose:
        raise t.refuse(f"ONNX has no form for the weights of {op_name(node.target)}", "Set decompose=true")
    features = int(node.args[0].meta["val"].shape[-1])
    names = [one.name for one in node.target._schema.arguments]
    name = f"{argument(node, names[1]).target}_dense"

    def make() -> ir.Value:
        # The op on the identity is its transposed weight, in every layout.
        given = {key: argument(node, key) for key in names[1:]}
        stored = {key: t.tensor(one) if isinstance(one, fx.Node) else one for key, one in given.items()}
        dense = node.target(torch.eye(features), **{**stored, "bias": None})
        return t.builder.weight(name, dense.T.contiguous())

    return product(t, node, t.shared_value(("dense", name), make), features)


def product(t: Translator, node: fx.Node, weight: ir.Value, width: int) -> ir.Value:
    """The product of a node's activations with a float32 weight [N, width], whose padding is cut off.

    Gemm reads the weight as it lies. A transposition would cost runtimes a copy for each call, and lets ONNX Runtime
    fuse the pair into a product that rounds activations too.
    """
    b, x, bias = t.builder, t.value(node.args[0]), argument(node, "bias")
    features = int(node.args[0].meta["val"].shape[-1])
    outputs = int(node.meta["val"].shape[-1])
    if width != features:
        weight = b("Slice", weight, b.ints([0]), b.ints([features]), b.ints([1]))
    if x.dtype != ir.DataType.FLOAT:
        weight = b("Cast", weight, to=x.dtype)
    rows = t.shared_value(("rows", x), lambda: b("Reshape", x, b.ints([-1, features])))
    product = b("Gemm", rows, weight, t.value(bias) if bias is not None else None, transB=1)
    leading = t.shared_value(("leading", x), lambda: b("Shape", x, start=0, end=-1))
    return b("Reshape", product, b("Concat", leading, b.ints([outputs]), axis=0))


def quantized_embedding(t: Translator, node: fx.Node) -> ir.Value:
    """Rows are looked up as codes, so that only they are dequantized."""
    b, indices = t.builder, t.value(node.args[0])
    weight, scale, zero_point = (t.tensor(argument(node, name)) for name in ("weight", "scale", "zero_point"))
    format, group_size = argument(node, "format"), argument(node, "group_size")
    name = str(argument(node, "weight").target)
    assert weight is not None and scale is not None  # noqa: S101, PT018
    kind = packing.FORMATS[format]
    if not kind.integer:
        raise t.refuse(f"A token table of format {format} has no form in ONNX", "Use embedding_bits=8")
    codes = packing.unpack(weight, format, group_size).to(kind.storage).unflatten(-1, (-1, group_size))
    rows = b("Cast", b("Gather", b.weight(f"{name}_rows", codes), indices, axis=0), to=ir.DataType.FLOAT)
    points = zeros(zero_point, scale, format).float().unsqueeze(-1)
    shift = b("Gather", b.weight(f"{name}_rows_zero", points), indices, axis=0) if points.any() else None
    scales = b("Gather", b.weight(f"{name}_rows_scale", scale.float().unsqueeze(-1)), indices, axis=0)
    dense = b("Mul", rows if shift is None else b("Sub", rows, shift), scales)
    rank = int(node.args[0].meta["val"].dim())
    dense = b("Reshape", dense, b.ints([*[0] * rank, -1]))
    width = argument(node, "embedding_dim")
    if width != codes.shape[1] * group_size:
        dense = b("Slice", dense, b.ints([0]), b.ints([width]), b.ints([-1]))
    dtype = onnx_dtype(argument(node, "dtype"))
    return dense if dtype == ir.DataType.FLOAT else b("Cast", dense, to=dtype)


QUANTIZED: dict[Any, OfNode] = {
    ops.quantized_linear.target: OfNode(quantized_linear),
    ops.quantized_embedding.target: OfNode(quantized_embedding),
    ops.sparse_linear.target: OfNode(whole_linear),
    ops.spqr_linear.target: OfNode(whole_linear),
}
"""Translations of the ops over low-bit weights."""
