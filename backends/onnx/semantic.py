"""Semantic ops in operators of ai.onnx alone; products over low-bit weights are in `quantized`."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright import ops, packing
from graphwright.backends.onnx.builder import Builder
from graphwright.backends.onnx.translate import OfNode, Translation, Translator, onnx_dtype
from graphwright.match import argument
from graphwright.ops.quantize_dequantize import LARGEST

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64

HIDDEN = -1e30
"""Added to the score of a hidden key. Finite: a query that sees no key, which is padding, must not become NaN."""


def rms_norm(t: Translator, x: ir.Value, weight: ir.Value | None, eps: float, unit_offset: bool = False) -> ir.Value:
    """In float32, as the op says; runtimes recognise this form."""
    b, narrow = t.builder, x.dtype
    wide = _cast(b, x, FLOAT)
    mean = b("ReduceMean", b("Pow", wide, b.scalar(2.0, FLOAT)), b.ints([-1]), keepdims=1)
    normed = b("Div", wide, b("Sqrt", b("Add", mean, b.scalar(eps, FLOAT))))
    if weight is None:
        return _cast(b, normed, narrow, FLOAT)
    if unit_offset:
        gain = b("Add", _cast(b, weight, FLOAT), b.scalar(1.0, FLOAT))
        return _cast(b, b("Mul", normed, gain), narrow, FLOAT)
    return b("Mul", _cast(b, normed, narrow, FLOAT), weight)


def gated_activation(t: Translator, gate: ir.Value, up: ir.Value, activation: str) -> ir.Value:
    """activation(gate) * up."""
    return t.builder("Mul", ACTIVATIONS[activation](t.builder, gate), up)


ACTIVATIONS: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "silu": lambda b, x: b("Mul", x, b("Sigmoid", x)),
    "gelu": lambda b, x: b("Gelu", x),
    "gelu_tanh": lambda b, x: b("Gelu", x, approximate="tanh"),
    "relu": lambda b, x: b("Relu", x),
}


def rotary_table(t: Translator, node: fx.Node, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine [B|1, S, R/2] of a rope node's positions, shared by all that rotate alike."""
    positions, inv_freq = (argument(node, name) for name in ("positions", "inv_freq"))
    scaling = argument(node, "scaling")

    def make() -> tuple[ir.Value, ir.Value]:
        b = t.builder
        places = b("Cast", b("Unsqueeze", t.value(positions), b.ints([-1])), to=FLOAT)
        angles = b("Mul", places, _cast(b, t.value(inv_freq), FLOAT))
        tables = [b(name, angles) for name in ("Cos", "Sin")]
        if scaling != 1.0:
            tables = [b("Mul", table, b.scalar(scaling, FLOAT)) for table in tables]
        cos, sin = (_cast(b, table, dtype, FLOAT) for table in tables)
        return cos, sin

    made: tuple[ir.Value, ir.Value] = t.shared_value(("rotary", positions, inv_freq, scaling, dtype), make)
    return made


def rope(t: Translator, node: fx.Node) -> ir.Value:
    """Pairs of channels turned by the shared table."""
    b, x = t.builder, t.value(node.args[0])
    cos, sin = (_per_head(t, table) for table in rotary_table(t, node, x.dtype))
    width, rotary = int(node.meta["val"].shape[-1]), 2 * int(argument(node, "inv_freq").meta["val"].shape[0])
    half, interleaved = rotary // 2, argument(node, "interleaved")
    places = [(0, rotary, 2), (1, rotary, 2)] if interleaved else [(0, half, 1), (half, rotary, 1)]
    first, second = (_columns(b, x, *place) for place in places)
    turned = [
        b("Sub", b("Mul", first, cos), b("Mul", second, sin)),
        b("Add", b("Mul", second, cos), b("Mul", first, sin)),
    ]
    if interleaved:
        pairs = b("Concat", *(b("Unsqueeze", part, b.ints([-1])) for part in turned), axis=-1)
        turned = [b("Reshape", pairs, b.ints([0, 0, 0, rotary]))]
    passing = [_columns(b, x, rotary, width, 1)] if rotary < width else []
    return b("Concat", *turned, *passing, axis=-1)


def _per_head(t: Translator, table: ir.Value) -> ir.Value:
    """[B|1, S, R/2] → [B|1, 1, S, R/2]."""
    made: ir.Value = t.shared_value(("per head", table), lambda: t.builder("Unsqueeze", table, t.builder.ints([1])))
    return made


def _columns(b: Builder, x: ir.Value, start: int, end: int, step: int) -> ir.Value:
    return b("Slice", x, b.ints([start]), b.ints([end]), b.ints([-1]), b.ints([step]))


def attention(t: Translator, node: fx.Node) -> ir.Value:
    """Scores, mask, softmax and sum, with the heads of a group side by side along the queries."""
    b = t.builder
    query, key, value = (t.value(node.args[i]) for i in range(3))
    narrow = query.dtype
    heads, kv_heads = (int(node.args[i].meta["val"].shape[1]) for i in (0, 1))
    query, key, value = (_cast(b, one, FLOAT) for one in (query, key, value))
    width, value_width = (int(node.args[i].meta["val"].shape[3]) for i in (0, 2))
    # [B, Hkv, groups * S, D]: keys are read once for all heads of their group, and never repeated.
    grouped = query if heads == kv_heads else b("Reshape", query, b.ints([0, kv_heads, -1, width]))
    scores = b("MatMul", grouped, b("Transpose", key, perm=[0, 1, 3, 2]))
    scores = b("Mul", scores, b.scalar(argument(node, "scale"), FLOAT))
    if heads != kv_heads:
        scores = b("Reshape", scores, _score_shape(t, node, heads))
    softcap = argument(node, "softcap")
    if softcap:
        limit = b.scalar(softcap, FLOAT)
        scores = b("Mul", b("Tanh", b("Div", scores, limit)), limit)
    weights = _softmax(t, node, b("Add", scores, mask(t, node)), heads)
    if heads != kv_heads:
        weights = b("Reshape", weights, _grouped_shape(t, node, kv_heads))
    result = b("MatMul", weights, value)
    if heads != kv_heads:
        result = b("Reshape", result, b.ints([0, heads, -1, value_width]))
    return _cast(b, result, narrow, FLOAT)


def _softmax(t: Translator, node: fx.Node, scores: ir.Value, heads: int) -> ir.Value:
    """Weights [B, H, S, T]; a sink takes part in the sum and carries no value."""
    b, sinks = t.builder, argument(node, "sinks")
    if sinks is None:
        return b("Softmax", scores, axis=-1)
    column = b("Reshape", _cast(b, t.value(sinks), FLOAT), b.ints([1, heads, 1, 1]))
    rows = b("Concat", b("Shape", scores, start=0, end=3), b.ints([1]), axis=0)
    joined = b("Softmax", b("Concat", scores, b("Expand", column, rows), axis=-1), axis=-1)
    return b("Slice", joined, b.ints([0]), b.ints([-1]), b.ints([-1]))


def _score_shape(t: Translator, node: fx.Node, heads: int) -> ir.Value:
    return t.shared_value(("score shape", _lengths(node), heads), lambda: _shape(t, node, heads, grouped=False))


def _grouped_shape(t: Translator, node: fx.Node, kv_heads: int) -> ir.Value:
    return t.shared_value(("grouped shape", _lengths(node), kv_heads), lambda: _shape(t, node, kv_heads, grouped=True))


def _lengths(node: fx.Node) -> tuple[str, str]:
    return str(node.args[0].meta["val"].shape[2]), str(node.args[1].meta["val"].shape[2])


def _shape(t: Translator, node: fx.Node, heads: int, grouped: bool) -> ir.Value:
    """[0, heads, S or -1, T]."""
    b = t.builder
    keys = b("Shape", t.value(node.args[1]), start=2, end=3)
    queries = b.ints([-1]) if grouped else b("Shape", t.value(node.args[0]), start=2, end=3)
    return b("Concat", b.ints([0, heads]), queries, keys, axis=0)


def mask(t: Translator, node: fx.Node) -> ir.Value:
    """What is added to the scores: float32 [B|1, H|1, S, T], shared by the layers that see alike."""
    b, slopes, bias = t.builder, argument(node, "alibi_slopes"), argument(node, "bias")
    seen = _visible(t, node)

    def with_slopes() -> ir.Value:
        query_at, key_at = _positions(t, node)
        distance = b("Cast", b("Sub", key_at, query_at), to=FLOAT)
        heads = b("Reshape", _cast(b, t.value(slopes), FLOAT), b.ints([1, -1, 1, 1]))
        return b("Add", b("Mul", heads, b("Unsqueeze", distance, b.ints([1]))), seen)

    total = seen if slopes is None else t.shared_value(("alibi", seen, slopes), with_slopes)
    return total if bias is None else b("Add", total, _cast(b, t.value(bias), FLOAT))


def _positions(t: Translator, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Query positions [B|1, S, 1] and key positions [B|1, 1, T]."""
    b = t.builder

    def positions(name: str, which: int, axis: int) -> ir.Value:
        given = argument(node, name)

        def make() -> ir.Value:
            if given is not None:
                return b("Unsqueeze", t.value(given), b.ints([axis]))
            length = b("Shape", t.value(node.args[which]), start=2, end=3)
            stop = b("Squeeze", length, b.ints([0]))
            steps = b("Range", b.scalar(0, INT64), stop, b.scalar(1, INT64))
            return b("Unsqueeze", steps, b.ints([0, axis]))

        key = given if given is not None else _lengths(node)[which]
        made: ir.Value = t.shared_value(("positions", key, axis), make)
        return made

    return positions("query_positions", 0, 2), positions("key_positions", 1, 1)


def _visible(t: Translator, node: fx.Node) -> ir.Value:
    """0 where a query sees a key, else `HIDDEN`: float32 [B|1, 1, S, T]."""
    names = ("causal", "window", "chunk", "prefix", "anchors", "block")
    causal, window, chunk, prefix, anchors, block = options = [argument(node, name) for name in names]
    query_at, key_at = _positions(t, node)

    def make() -> ir.Value:
        b = t.builder
        number = lambda value: b.scalar(value, INT64)  # noqa: E731
        seen = b("GreaterOrEqual", key_at, number(0))
        if causal:
            before = b("LessOrEqual", key_at, query_at)
            seen = b("And", seen, b("Or", before, b("Less", key_at, number(prefix))) if prefix else before)
        # Padding has position -1 and is hidden already, so division may round towards zero.
        parts = lambda size: [b("Div", at, number(size)) for at in (query_at, key_at)]  # noqa: E731
        near = []
        if window:
            distance = b("Abs", b("Sub", *(parts(block) if block else (query_at, key_at))))
            near.append(b("Less", b("Mul", distance, number(block)) if block else distance, number(window)))
        if chunk:
            near.append(b("Equal", *parts(chunk)))
        if near and anchors:
            either = b("Or", *(b("Less", at, number(anchors)) for at in (query_at, key_at)))
            near = [b("Or", b("And", *near) if len(near) == 2 else near[0], either)]
        for condition in near:
            seen = b("And", seen, condition)
        added = b("Where", seen, b.scalar(0.0, FLOAT), b.scalar(HIDDEN, FLOAT))
        return b("Unsqueeze", added, b.ints([1]))

    made: ir.Value = t.shared_value(("visible", query_at, key_at, *options), make)
    return made


def narrow_mask(t: Translator, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A mask in a dtype whose numbers do not reach as far down."""
    return t.builder("Cast", t.builder("Max", mask, t.builder.scalar(-6e4, FLOAT)), to=dtype)


def grouped_linear(t: Translator, node: fx.Node) -> ir.Value:
    """One product per expert over its slice of the rows; slices may be empty."""
    b = t.builder
    x, weight, ends = (t.value(node.args[i]) for i in range(3))
    experts, _, outputs = (int(size) for size in node.args[1].meta["val"].shape)
    limits = b("Cast", ends, to=INT64)
    parts, start = [], b.ints([0])
    for expert in range(experts):
        end = b("Slice", limits, b.ints([expert]), b.ints([expert + 1]))
        rows = b("Slice", x, start, end, b.ints([0]))
        parts.append(b("MatMul", rows, b("Gather", weight, b.scalar(expert, INT64), axis=0)))
        start = end
    rest = b("Concat", b("Sub", b("Shape", x, start=0, end=1), start), b.ints([outputs]), axis=0)
    parts.append(b("Expand", b("Cast", b.scalar(0.0, FLOAT), to=x.dtype), rest))
    return b("Concat", *parts, axis=0)


def quantize_dequantize(t: Translator, node: fx.Node) -> ir.Value:
    """Rounding to codes and back in float32, with the scale of each token and group."""
    b, x = t.builder, t.value(node.args[0])
    scale, format, group_size = (argument(node, name) for name in ("scale", "format", "group_size"))
    largest, narrow = LARGEST[format], onnx_dtype(node.meta["val"].dtype)
    wide = _cast(b, x, FLOAT)
    shape = b("Shape", wide)
    if group_size:
        leading = b("Slice", shape, b.ints([0]), b.ints([-1]))
        wide = b("Reshape", wide, b("Concat", leading, b.ints([-1, group_size]), axis=0))
    if scale is None:
        most = b("ReduceMax", b("Abs", wide), b.ints([-1]), keepdims=1)
        step = b("Max", b("Div", most, b.scalar(largest, FLOAT)), b.scalar(torch.finfo(torch.float32).tiny, FLOAT))
    else:
        step = _cast(b, t.value(scale), FLOAT)
    codes = b("Clip", b("Div", wide, step), b.scalar(-largest, FLOAT), b.scalar(largest, FLOAT))
    floating = packing.FORMATS[format].dtype
    codes = b("Round", codes) if floating is None else _cast(b, _cast(b, codes, onnx_dtype(floating)), FLOAT)
    rounded = b("Mul", codes, step)
    return _cast(b, b("Reshape", rounded, shape) if group_size else rounded, narrow, FLOAT)


def hadamard_transform(t: Translator, node: fx.Node) -> ir.Value:
    """Blocks of channels times the Hadamard matrix, in float32 as the op says."""
    b, block = t.builder, int(argument(node, "block_size"))
    x, narrow = t.value(node.args[0]), onnx_dtype(node.meta["val"].dtype)
    matrix = t.shared_value(
        ("hadamard", block),
        lambda: b.weight(f"hadamard_{block}", ops.hadamard_transform.reference(torch.eye(block), block)),
    )
    blocks = b("Reshape", _cast(b, x, FLOAT), b.ints([-1, block]))
    return _cast(b, b("Reshape", b("MatMul", blocks, matrix), b("Shape", x)), narrow, FLOAT)


def _cast(b: Builder, value: ir.Value, dtype: Any, known: ir.DataType | None = None) -> ir.Value:
    """`value` as `dtype`; `known` is what it is where the graph does not say."""
    if value.dtype is None and known is not None:
        value.dtype = known
    return value if value.dtype == dtype else _typed(b("Cast", value, to=dtype), dtype)


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.dtype = dtype
    return value


SEMANTIC: dict[Any, Translation | OfNode] = {
    ops.rms_norm.target: rms_norm,
    ops.gated_activation.target: gated_activation,
    ops.rope.target: OfNode(rope),
    ops.attention.target: OfNode(attention),
    ops.grouped_linear.target: OfNode(grouped_linear),
    ops.quantize_dequantize.target: OfNode(quantize_dequantize),
    ops.hadamard_transform.target: OfNode(hadamard_transform),
}
"""Translations of semantic ops."""
