"""ATen operators that raising leaves, in operators of ai.onnx.

A function takes the translator and the ATen operator's arguments by their own names and defaults.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphwright.backends.onnx.translate import Translation, Translator, onnx_dtype

aten = torch.ops.aten

END = torch.iinfo(torch.int64).max


def _cast(t: Translator, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return value if value.dtype == dtype else t.builder("Cast", value, to=dtype)


def _result(t: Translator) -> ir.DataType:
    """The dtype of the node's value."""
    return onnx_dtype(t.node.meta["val"].dtype)


def _operand(t: Translator, value: Any, dtype: ir.DataType) -> ir.Value:
    return _cast(t, value, dtype) if isinstance(value, ir.Value) else t.builder.scalar(value, dtype)


def _binary(op_type: str) -> Translation:
    """Arithmetic in the dtype of the result."""

    def write(t: Translator, self: Any, other: Any, alpha: float = 1) -> ir.Value:
        dtype = _result(t)
        right = _operand(t, other, dtype)
        if alpha != 1:
            right = t.builder("Mul", right, t.builder.scalar(alpha, dtype))
        return t.builder(op_type, _operand(t, self, dtype), right)

    return write


def _comparison(op_type: str) -> Translation:
    """A comparison in the dtype that torch promotes both sides to."""

    def write(t: Translator, self: ir.Value, other: Any) -> ir.Value:
        source = t.node.args[0].meta["val"]
        against = t.node.args[1]
        dtype = torch.result_type(
            torch.empty(1, dtype=source.dtype),
            torch.empty(1, dtype=against.meta["val"].dtype) if isinstance(against, torch.fx.Node) else against,
        )
        wide = onnx_dtype(dtype)
        return t.builder(op_type, _operand(t, self, wide), _operand(t, other, wide))

    return write


def _unary(op_type: str) -> Translation:
    return lambda t, self: t.builder(op_type, self)


def _not_equal(t: Translator, self: ir.Value, other: Any) -> ir.Value:
    return t.builder("Not", _comparison("Equal")(t, self, other))


def _remainder(t: Translator, self: ir.Value, other: Any) -> ir.Value:
    dtype = _result(t)
    if dtype.is_floating_point():
        raise t.refuse("A remainder of floating-point numbers is not translated")
    return t.builder("Mod", _operand(t, self, dtype), _operand(t, other, dtype))


def _floor_divide(t: Translator, self: ir.Value, other: Any) -> ir.Value:
    dtype = _result(t)
    if dtype.is_floating_point():
        return t.builder("Floor", t.builder("Div", _operand(t, self, dtype), _operand(t, other, dtype)))
    # Div truncates; what Mod leaves over has the sign of the divisor, so without it the quotient is exact.
    left, right = _operand(t, self, dtype), _operand(t, other, dtype)
    return t.builder("Div", t.builder("Sub", left, t.builder("Mod", left, right)), right)


def _pow(t: Translator, self: ir.Value, exponent: float) -> ir.Value:
    return t.builder("Pow", _cast(t, self, _result(t)), t.builder.scalar(exponent, _result(t)))


def _clamp(t: Translator, self: ir.Value, min: float | None = None, max: float | None = None) -> ir.Value:
    bounds = [None if bound is None else t.builder.scalar(bound, self.dtype) for bound in (min, max)]
    return t.builder("Clip", self, *bounds)


def _where(t: Translator, condition: ir.Value, self: Any, other: Any) -> ir.Value:
    return t.builder("Where", condition, _operand(t, self, _result(t)), _operand(t, other, _result(t)))


def _masked_fill(t: Translator, self: ir.Value, mask: ir.Value, value: float) -> ir.Value:
    return _where(t, mask, value, self)


def _to(t: Translator, self: ir.Value, dtype: torch.dtype, *_rest: Any, **_more: Any) -> ir.Value:
    return t.builder("Cast", self, to=onnx_dtype(dtype))


def _softmax(t: Translator, self: ir.Value, dim: int, dtype: torch.dtype | None = None) -> ir.Value:
    return t.builder("Softmax", _cast(t, self, _result(t)), axis=dim)


def _gelu(t: Translator, self: ir.Value, approximate: str = "none") -> ir.Value:
    return t.builder("Gelu", self, approximate=approximate)


def _sum(
    t: Translator, self: ir.Value, dim: Sequence[int] | None, keepdim: bool = False, dtype: Any = None
) -> ir.Value:
    axes = None if not dim else t.builder.ints(dim)
    return t.builder("ReduceSum", _cast(t, self, _result(t)), axes, keepdims=int(keepdim))


def _cumsum(t: Translator, self: ir.Value, dim: int, dtype: Any = None) -> ir.Value:
    return t.builder("CumSum", _cast(t, self, _result(t)), t.builder.scalar(dim, ir.DataType.INT64))


def _extreme(op_type: str) -> Translation:
    def translate(t: Translator, self: ir.Value, dim: Sequence[int] = (), keepdim: bool = False) -> ir.Value:
        axes = [t.builder.ints(dim)] if dim else []
        return t.builder(op_type, self, *axes, keepdims=int(keepdim))

    return translate


def _layer_norm(
    t: Translator,
    input: ir.Value,
    normalized_shape: Sequence[int],
    weight: ir.Value | None = None,
    bias: ir.Value | None = None,
    eps: float = 1e-5,
    _cudnn: bool = True,
) -> ir.Value:
    if weight is None:
        weight = t.builder.constant([1.0] * normalized_shape[0], input.dtype)
    return t.builder("LayerNormalization", input, weight, bias, axis=-len(normalized_shape), epsilon=eps)


def _linear(t: Translator, input: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    # Runtimes fold the transposition of a constant; the file then holds the one matrix that a tied embedding shares.
    product = t.builder("MatMul", input, t.builder("Transpose", weight, perm=[1, 0]))
    return product if bias is None else t.builder("Add", product, bias)


# What moves


def _reshape(t: Translator, self: ir.Value, shape: Sequence[Any]) -> ir.Value:
    sizes = list(shape)
    old, new = t.node.args[0].meta["val"].shape, t.node.meta["val"].shape
    for axis, size in enumerate(sizes):
        if isinstance(size, int):
            continue
        if axis < len(old) and str(old[axis]) == str(new[axis]):
            sizes[axis] = 0  # as the input's; saves runtimes from computing shapes
        elif all(other != -1 for other in sizes if isinstance(other, int)) and len(_symbolic(sizes)) == 1:
            sizes[axis] = -1
    return t.builder("Reshape", self, t.vector(sizes))


def _symbolic(sizes: Sequence[Any]) -> list[Any]:
    return [size for size in sizes if not isinstance(size, int)]


def _expand(t: Translator, self: ir.Value, size: Sequence[Any], implicit: bool = False) -> ir.Value:
    return t.builder("Expand", self, t.vector([1 if isinstance(s, int) and s == -1 else s for s in size]))


def _transpose(t: Translator, self: ir.Value, dim0: int, dim1: int) -> ir.Value:
    order = list(range(t.node.meta["val"].dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return t.builder("Transpose", self, perm=order)


def _permute(t: Translator, self: ir.Value, dims: Sequence[int]) -> ir.Value:
    return t.builder("Transpose", self, perm=[dim % len(dims) for dim in dims])


def _slice(t: Translator, self: ir.Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> ir.Value:
    first = t.size(0 if start is None else start)
    last = t.size(END if end is None else end)
    return t.builder("Slice", self, first, last, t.builder.ints([dim]), t.builder.ints([step]))


def _slice_scatter(
    t: Translator, self: ir.Value, src: ir.Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ir.Value:
    if step != 1:
        raise t.refuse("A strided slice is written")
    before = _slice(t, self, dim, 0, 0 if start is None else start)
    after = _slice(t, self, dim, END if end is None else end, END)
    return t.builder("Concat", before, src, after, axis=dim)


def _select(t: Translator, self: ir.Value, dim: int, index: int) -> ir.Value:
    return t.builder("Gather", self, t.builder.scalar(index, ir.DataType.INT64), axis=dim)


def _axes(op_type: str) -> Translation:
    return lambda t, self, dim: t.builder(op_type, self, t.builder.ints([dim]))


def _cat(t: Translator, tensors: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    return t.builder("Concat", *(_cast(t, tensor, _result(t)) for tensor in tensors), axis=dim)


def _split(t: Translator, self: ir.Value, sizes: Any, dim: int = 0) -> Any:
    parts = [part.shape[dim] for part in t.node.meta["val"]]
    if not all(isinstance(size, int) for size in parts):
        raise t.refuse("A dimension of unknown size is split")
    return t.builder("Split", self, t.builder.ints(parts), axis=dim, outputs=len(parts))


def _copy(t: Translator, self: ir.Value, src: ir.Value, non_blocking: bool = False) -> ir.Value:
    return t.builder("Expand", _cast(t, src, _result(t)), t.builder("Shape", self))


# What looks up


def _embedding(t: Translator, weight: ir.Value, indices: ir.Value, *_rest: Any) -> ir.Value:
    return t.builder("Gather", weight, indices, axis=0)


def _index(t: Translator, self: ir.Value, indices: Sequence[ir.Value | None]) -> ir.Value:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise t.refuse("Several dimensions are indexed by tensors at once")
    ((axis, index),) = given
    return t.builder("Gather", self, index, axis=axis)


def _index_put(
    t: Translator, self: ir.Value, indices: Sequence[ir.Value | None], values: ir.Value, accumulate: bool = False
) -> ir.Value:
    if len(indices) != 1 or indices[0] is None or accumulate:
        raise t.refuse("Only rows of the first dimension are written by index, and not added up")
    return t.builder("ScatterND", self, t.builder("Unsqueeze", indices[0], t.builder.ints([-1])), values)


def _gather(t: Translator, self: ir.Value, dim: int, index: ir.Value, sparse_grad: bool = False) -> ir.Value:
    return t.builder("GatherElements", self, index, axis=dim)


def _scatter(t: Translator, self: ir.Value, dim: int, index: ir.Value, value: float) -> ir.Value:
    filled = t.builder("Expand", t.builder.scalar(value, self.dtype), t.builder("Shape", index))
    return t.builder("ScatterElements", self, index, filled, axis=dim)


def _topk(t: Translator, self: ir.Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return t.builder("TopK", self, t.builder.ints([k]), axis=dim, largest=int(largest), sorted=int(sorted), outputs=2)


def _sort(t: Translator, self: ir.Value, dim: int = -1, descending: bool = False) -> Any:
    rank = t.node.args[0].meta["val"].dim()
    length = t.builder("Shape", self, start=dim % rank, end=dim % rank + 1)
    return t.builder("TopK", self, length, axis=dim, largest=int(descending), sorted=1, outputs=2)


def _histc(t: Translator, self: ir.Value, bins: int = 100, min: float = 0, max: float = 0) -> ir.Value:
    if min >= max:
        raise t.refuse("A histogram has no range of its own")
    dtype = _result(t)
    scaled = t.builder("Sub", self, t.builder.scalar(min, dtype))
    place = t.builder("Floor", t.builder("Mul", scaled, t.builder.scalar(bins / (max - min), dtype)))
    # The largest value belongs to the last bin; what is larger still belongs to none.
    last = t.builder("Equal", self, t.builder.scalar(max, dtype))
    place = t.builder("Where", last, t.builder.scalar(bins - 1, dtype), place)
    hit = t.builder(
        "Equal", t.builder("Unsqueeze", place, t.builder.ints([-1])), t.builder.constant([*range(bins)], dtype)
    )
    return t.builder("ReduceSum", t.builder("Cast", hit, to=dtype), t.builder.ints([0]), keepdims=0)


# What asks for sizes


def _size(t: Translator, self: ir.Value, dim: int) -> ir.Value:
    return t.builder("Shape", self, start=dim, end=dim + 1)


def _arange(t: Translator, end: Any, dtype: torch.dtype | None = None, **_more: Any) -> ir.Value:
    stop = t.builder("Squeeze", t.size(end), t.builder.ints([0]))
    zero, one = (t.builder.scalar(n, ir.DataType.INT64) for n in (0, 1))
    return _cast(t, _int64(t.builder("Range", zero, stop, one)), _result(t))


def _int64(value: ir.Value) -> ir.Value:
    value.dtype = ir.DataType.INT64
    return value


def _filled(t: Translator, shape: ir.Value) -> ir.Value:
    zero = ir.tensor([0.0 if _result(t).is_floating_point() else 0], dtype=_result(t))
    return t.builder("ConstantOfShape", shape, value=zero)


def _zeros_like(t: Translator, self: ir.Value, **_more: Any) -> ir.Value:
    return _filled(t, t.builder("Shape", self))


def _new_empty(t: Translator, self: ir.Value, size: Sequence[Any], **_more: Any) -> ir.Value:
    return _filled(t, t.vector(size))


ATEN: dict[Callable[..., Any], Translation] = {
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.pow.Tensor_Tensor: _binary("Pow"),
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder,
    aten.pow.Tensor_Scalar: _pow,
    aten.tanh.default: _unary("Tanh"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.relu.default: _unary("Relu"),
    aten.logical_not.default: _unary("Not"),
    aten.ne.Scalar: _not_equal,
    aten.ge.Scalar: _comparison("GreaterOrEqual"),
    aten.gt.Tensor: _comparison("Greater"),
    aten.logical_and.default: lambda t, self, other: t.builder("And", self, other),
    aten.amin.default: _extreme("ReduceMin"),
    aten.amax.default: _extreme("ReduceMax"),
    aten.clamp.default: _clamp,
    aten.where.ScalarOther: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.to.dtype: _to,
    aten.softmax.int: _softmax,
    aten.gelu.default: _gelu,
    aten.sum.dim_IntList: _sum,
    aten.cumsum.default: _cumsum,
    aten.layer_norm.default: _layer_norm,
    aten.linear.default: _linear,
    aten.reshape.default: _reshape,
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.slice_scatter.default: _slice_scatter,
    aten.select.int: _select,
    aten.unsqueeze.default: _axes("Unsqueeze"),
    aten.squeeze.dim: _axes("Squeeze"),
    aten.cat.default: _cat,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.copy.default: _copy,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.gather.default: _gather,
    aten.scatter.value: _scatter,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.histc.default: _histc,
    aten.sym_size.int: _size,
    aten.arange.default: _arange,
    aten.zeros_like.default: _zeros_like,
    aten.empty_like.default: _zeros_like,
    aten.new_empty.default: _new_empty,
}
"""Translations of ATen operators."""
