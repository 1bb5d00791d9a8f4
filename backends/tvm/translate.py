"""From a program to one Relax function: kernels for semantic ops, views for what only moves, converters for the rest.

The function takes the contract's inputs and state in order, and one tuple with all weights. State is updated in place
by the kernels that write it.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from tvm import relax, tirx

from graphwright import ops
from graphwright.backends.tvm.expert_layout import tiled_experts, up_rows
from graphwright.backends.tvm.expert_store import FETCH
from graphwright.backends.tvm.fusion import NORMS, Fusion, integer_product
from graphwright.backends.tvm.layout import (
    tiled_embedding,
    tiled_float_embedding,
    tiled_float_linear,
    tiled_linear,
    tiled_sparse_linear,
)
from graphwright.backends.tvm.leftovers import Leftovers
from graphwright.backends.tvm.values import (
    Sizes,
    View,
    expand,
    insert,
    narrow,
    reshape,
    shape_of,
    size_of,
    transpose,
)
from graphwright.errors import BackendError
from graphwright.kernels.tir import attention as attention_kernels
from graphwright.kernels.tir import attention_tiles, attention_vectors
from graphwright.kernels.tir import rope as rope_kernels
from graphwright.kernels.tir.copy import copy
from graphwright.kernels.tir.embedding import embedding
from graphwright.kernels.tir.emit import Layout
from graphwright.kernels.tir.experts import (
    Limit,
    Routing,
    choose_tokens,
    combine,
    expert_linear,
    limit_choices,
    route,
    sort_choices,
)
from graphwright.kernels.tir.float_linear import matrix as float_matrix
from graphwright.kernels.tir.float_linear import vector as float_vector
from graphwright.kernels.tir.gated_activation import gated_activation
from graphwright.kernels.tir.isa import Isa
from graphwright.kernels.tir.linear import Linear, Schedule
from graphwright.kernels.tir.normalize import Norm, normalize
from graphwright.kernels.tir.quantize import CodeRow, dequantize_tokens, quantize
from graphwright.kernels.tir.quantized_linear import DEFAULT, code_row
from graphwright.kernels.tir.quantized_linear import matrix as integer_matrix
from graphwright.kernels.tir.quantized_linear import vector as integer_vector
from graphwright.kernels.tir.tiles import ROWS
from graphwright.match import arguments
from graphwright.ops.expert_capacity import ratio
from graphwright.program import Program
from graphwright.rewrite import describe

aten = torch.ops.aten

CACHED = ("float32", "float16")
"""Dtypes of caches of plain numbers."""

KEY_PARTS = 8
"""Tasks that the keys and heads of one decode step are cut into, at least."""


class Translator:
    """Writes one function into a module.

    Args:
        program: with weights in tiles.
        fusion: what becomes one kernel.
        isa: the instruction set of the integer products.
        builder: of the module with Relax functions.
        kernels: of the module with kernels, which Relax calls by name.
        fixed: sizes of symbols that are constants in this function.
        schedules: how the kernels of integer layers go about their work.
    """

    def __init__(
        self,
        program: Program,
        fusion: Fusion,
        isa: Isa,
        builder: relax.BlockBuilder,
        kernels: relax.BlockBuilder,
        fixed: Mapping[str, int],
        schedules: Callable[[Linear], Schedule] = lambda _layer: DEFAULT,
    ) -> None:
        self.program, self.fusion, self.isa, self.fixed = program, fusion, isa, fixed
        self.schedules = schedules
        self.builder, self.kernels = builder, kernels
        self.sizes = Sizes()
        self.values: dict[fx.Node, Any] = {}
        self.codes: dict[tuple[fx.Node, CodeRow], relax.Expr] = {}
        self.tables: dict[tuple[Any, ...], tuple[relax.Expr, relax.Expr]] = {}
        self.weights: dict[str, relax.Expr] = {}
        self.leftovers = Leftovers(builder, self._for_converter)

    def write(self, name: str) -> None:
        """Emits the function.

        Raises:
            BackendError: a node that cannot be translated.
        """
        inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        parameters = [self._parameter(node) for node in inputs]
        stored = self.program.weights()
        fields = [relax.TensorType(tuple(t.shape), dtype_of(t)) for t in stored.values()]
        tuple_ = relax.Var("weights", relax.TupleType(fields))
        # The number of inputs tells Relax that what follows them are weights.
        attributes = {"num_input": len(parameters), "relax.force_pure": True}
        with self.builder.function(name, [*parameters, tuple_], attrs=attributes):
            self._places = {weight: relax.TupleGetItem(tuple_, i) for i, weight in enumerate(stored)}
            for node in self.program.graph.nodes:
                if node.op == "call_function" and node not in self.fusion.inside:
                    self._call(node)
            outputs = self.program.graph.output_node().args[0]
            results = [self.dense(node) for node in outputs]
            self.builder.emit_func_output(relax.Tuple(results))

    def _parameter(self, node: fx.Node) -> relax.Var:
        value = node.meta["val"]
        layout = Layout.contiguous(shape_of(value, self.fixed))
        variable = relax.Var(str(node.target), self._type(layout.shape, dtype_of(value)))
        self.values[node] = View(variable, layout, dtype_of(value))
        return variable

    def _type(self, shape: Sequence[Any], dtype: str) -> relax.TensorType:
        return relax.TensorType([self.sizes(size) for size in shape], dtype)

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return
        if node in self.fusion.linear:
            self.values[node] = self._linear(self.fusion.linear[node], node)
            return
        if node.target in VIEWS:
            made = VIEWS[node.target](self, node)
            if made is not None:
                self.values[node] = made
                return
        if node.target in KERNELS:
            self.values[node] = KERNELS[node.target](self, node)
            return
        converted = self.leftovers.convert(node)
        if isinstance(value, torch.Tensor):
            converted = View(converted, Layout.contiguous(shape_of(value, self.fixed)), dtype_of(value))
        self.values[node] = converted

    # Values

    def view(self, node: Any, dtype: str = "") -> View:
        """The tensor of a node, of the dtype that a kernel asks for.

        Raises:
            BackendError: it has another dtype.
        """
        found = self.values.get(node)
        if node.op == "get_attr":
            tensor = self.program.weight(node)
            found = View(self.weight(node), Layout.contiguous(tuple(tensor.shape)), dtype_of(tensor))
        if not isinstance(found, View):
            raise BackendError("A value that is no tensor is used as one", where=describe(node))
        if dtype and found.dtype != dtype:
            raise BackendError(
                f"The TVM kernels take {dtype} here and found {found.dtype}",
                where=describe(node),
                fix="Use backend='inductor'",
            )
        return found

    def weight(self, node: fx.Node) -> relax.Expr:
        """The variable that holds a weight."""
        name = str(node.target)
        if name not in self.weights:
            self.weights[name] = self.builder.emit(self._places[name])
        return self.weights[name]

    def dense(self, node: fx.Node) -> relax.Expr:
        """A variable that holds exactly the tensor of a node; views are copied."""
        found = self.view(node)
        if found.dense:
            return found.variable
        made = self.kernel(
            lambda s: copy(s.layout(found.layout), found.dtype), [found.variable], [(found.layout.shape, found.dtype)]
        )[0]
        self.values[node] = View(made, Layout.contiguous(found.layout.shape), found.dtype)
        return made

    def _for_converter(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self.sizes(size_of(value, self.fixed))
        if isinstance(value, torch.Tensor):
            return self.dense(node)
        return self.values[node]

    def rows(self, node: Any, dtype: str = "float32") -> View:
        """A tensor whose last dimension is contiguous, as kernels over rows take it."""
        found = self.view(node, dtype)
        if found.layout.strides[-1] != 1 and found.layout.shape[-1] != 1:
            self.dense(node)
            found = self.view(node, dtype)
        return found

    def kernel(
        self,
        build: Callable[[Sizes], tirx.PrimFunc],
        inputs: Sequence[relax.Expr],
        outputs: Sequence[tuple[Sequence[Any], str]],
    ) -> list[relax.Expr]:
        """Calls a kernel that writes new tensors; equal kernels are one function."""
        types = [self._type(shape, dtype) for shape, dtype in outputs]
        out_ty = types if len(types) > 1 else types[0]
        made = self.builder.emit(relax.call_dps_packed(self._named(build(Sizes())), list(inputs), out_ty=out_ty))
        return [self.builder.emit(relax.TupleGetItem(made, i)) for i in range(len(types))] if len(types) > 1 else [made]

    def update(self, build: Callable[[Sizes], tirx.PrimFunc], arguments: Sequence[relax.Expr]) -> None:
        """Calls a kernel that writes its last argument in place."""
        name = relax.ExternFunc(self._named(build(Sizes())))
        self.builder.emit(relax.Call(name, list(arguments), ty_args=[relax.TupleType([])]))

    def _named(self, function: tirx.PrimFunc) -> str:
        """The name of a kernel in the library; equal kernels are one."""
        name = str(function.attrs["global_symbol"])
        return str(self.kernels.add_func(function.without_attr("global_symbol"), name).name_hint)

    def view_of(self, variable: relax.Expr, shape: Sequence[Any], dtype: str = "float32") -> View:
        """A whole variable as a view."""
        return View(variable, Layout.contiguous(tuple(shape)), dtype)

    # Integer products

    def _codes(self, rounding: Any, row: CodeRow) -> relax.Expr:
        """Rows of the codes that a rounding stands for."""
        key = (rounding, row)
        if key not in self.codes:
            norm = self.fusion.norm.get(rounding)
            source = self.rows((norm or rounding).args[0])
            shape = source.layout.shape
            outputs = [((*shape[:-1], row.bytes), "int8")]
            if norm is None:
                made = self.kernel(lambda s: quantize(s.layout(source.layout), row), [source.variable], outputs)
            else:
                described, gains = self._norm(norm)
                made = self.kernel(
                    lambda s: normalize(described, s.layout(source.layout), row),
                    [source.variable, *gains],
                    outputs,
                )
            self.codes[key] = made[0]
        return self.codes[key]

    def _norm(self, node: fx.Node) -> tuple[Norm, list[relax.Expr]]:
        given = arguments(node)
        weight, bias = given["weight"], given.get("bias")
        if node.target is ops.rms_norm.target:
            norm = Norm("rms", given["eps"], weight is not None, unit_offset=given["unit_offset"])
        elif len(given["normalized_shape"]) == 1:
            norm = Norm("layer", given["eps"], weight is not None, bias is not None)
        else:
            raise BackendError("The TVM backend normalises the last dimension only", where=describe(node))
        gains = [part for part in (weight, bias) if part is not None]
        return norm, [self.view(gain, "float32").variable for gain in gains]

    def _linear(self, node: fx.Node, finish: fx.Node | None = None) -> View:
        """A linear layer, up to the node that its epilogue computes."""
        layer, stored, bias = self._described(node, finish)
        shape = (*shape_of(node.meta["val"], self.fixed)[:-1], layer.width)
        one = all(size == 1 for size in shape[:-1])
        if integer_product(node):
            layer = replace(layer, code_group=int(node.args[0].args[3]))
            first = self._codes(node.args[0], code_row(layer))
            build = partial(integer_vector, layer, self.isa)
            if not one:
                build = partial(integer_matrix, layer, self.isa, schedule=self.schedules(layer))
        else:
            first = self.dense(node.args[0])
            build = partial(float_matrix, layer, self.isa.lanes)
            if one:
                build = partial(float_vector, layer, self.isa.lanes, pick=self.isa.pick_floats)
        inputs = [first, *stored]
        if bias is not None:
            inputs.append(self.view(bias, "float32").variable)
        if layer.residual:
            inputs.append(self.dense(next(a for a in finish.args if a is not node)))
        made = self.kernel(lambda s: build([s.dim(size) for size in shape[:-1]]), inputs, [(shape, "float32")])
        return self.view_of(made[0], shape)

    def _described(self, node: fx.Node, finish: fx.Node | None) -> tuple[Linear, list[relax.Expr], Any]:
        """A linear layer for its kernel, the variables that hold its weight, and its bias."""
        width = int(node.args[0].meta["val"].shape[-1])
        if node.target is tiled_float_linear.target:
            _, weight, bias, outputs = node.args
            layer, stored = Linear(int(outputs), width, "float32", width), [weight]
        else:
            _, weight, scale, zero, bias, format, group_size, outputs, *places = node.args
            scale_dtype = "" if scale is None else dtype_of(scale.meta["val"])
            shape = (int(outputs), width, str(format) or "float32", int(group_size) or width)
            layer = Linear(*shape, zero is not None, scale_dtype, halved=bool(places))
            stored = [part for part in (weight, *places, scale, zero) if part is not None]
        gated = finish is not None and finish.target is ops.gated_activation.target
        layer = replace(
            layer,
            bias=bias is not None,
            residual=finish is not None and not gated,
            activation=str(finish.args[2]) if gated else "",
        )
        return layer, [self.weight(part) for part in stored], bias


def dtype_of(tensor: torch.Tensor) -> str:
    """TVM's name of a dtype."""
    return str(tensor.dtype).removeprefix("torch.")


# Views


def _transpose(t: Translator, node: fx.Node) -> View:
    source = t.view(node.args[0])
    order = list(range(len(source.layout.shape)))
    first, second = (int(d) % len(order) for d in node.args[1:])
    order[first], order[second] = order[second], order[first]
    return View(source.variable, transpose(source.layout, order), source.dtype)


def _permute(t: Translator, node: fx.Node) -> View:
    source = t.view(node.args[0])
    order = [int(d) % len(source.layout.shape) for d in node.args[1]]
    return View(source.variable, transpose(source.layout, order), source.dtype)


def _slice(t: Translator, node: fx.Node) -> View | None:
    given = arguments(node)
    view, start = t.view(given["self"]), given["start"]
    at = given["dim"] % len(view.layout.shape)
    if not isinstance(start, (int, type(None))) or (start or 0) < 0:
        return None
    length = shape_of(node.meta["val"], t.fixed)[at]
    return View(view.variable, narrow(view.layout, at, start or 0, length, given["step"]), view.dtype)


def _reshape(t: Translator, node: fx.Node) -> View | None:
    source = t.view(node.args[0])
    layout = reshape(source.layout, shape_of(node.meta["val"], t.fixed))
    return None if layout is None else View(source.variable, layout, source.dtype)


def _unsqueeze(t: Translator, node: fx.Node) -> View:
    source = t.view(node.args[0])
    dim = int(node.args[1]) % (len(source.layout.shape) + 1)
    return View(source.variable, insert(source.layout, dim), source.dtype)


def _expand(t: Translator, node: fx.Node) -> View | None:
    source = t.view(node.args[0])
    layout = expand(source.layout, shape_of(node.meta["val"], t.fixed))
    return None if layout is None else View(source.variable, layout, source.dtype)


def constant_place(node: fx.Node) -> tuple[int, fx.Node] | None:
    """Dimension and index of an indexing by one stored number, as in x[:, [-1]]; None for any other."""
    given = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]
    if len(given) != 1 or given[0][1].op != "get_attr" or given[0][1].meta["val"].shape != (1,):
        return None
    return given[0]


def _index(t: Translator, node: fx.Node) -> View | None:
    found = constant_place(node)
    if found is None:
        return None
    (dim, index), view = found, t.view(node.args[0])
    place = int(t.program.weight(index))
    start = place if place >= 0 else view.layout.shape[dim] + place
    return View(view.variable, narrow(view.layout, dim, start, 1), view.dtype)


def _same(t: Translator, node: fx.Node) -> View | None:
    source = t.view(node.args[0])
    return source if source.dtype == dtype_of(node.meta["val"]) or node in t.fusion.widened else None


def _split(t: Translator, node: fx.Node) -> list[View]:
    given = arguments(node)
    view, start, parts = t.view(given["self"]), 0, []
    at = given["dim"] % len(view.layout.shape)
    for size in given["split_sizes"]:
        parts.append(View(view.variable, narrow(view.layout, at, start, size), view.dtype))
        start += size
    return parts


def _item(t: Translator, node: fx.Node) -> View | None:
    source = t.values[node.args[0]]
    return source[node.args[1]] if isinstance(source, list) else None


VIEWS: Mapping[Any, Callable[[Translator, fx.Node], View | list[View] | None]] = {
    aten.split_with_sizes.default: _split,
    operator.getitem: _item,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.index.Tensor: _index,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.to.dtype: _same,
}
"""Ops that may only change the layout; None where one must move data after all."""


# Kernels


def _linear(t: Translator, node: fx.Node) -> View:
    return t._linear(node)


def _normalize(t: Translator, node: fx.Node) -> View:
    source = t.rows(node.args[0])
    norm, gains = t._norm(node)
    shape = source.layout.shape
    made = t.kernel(lambda s: normalize(norm, s.layout(source.layout)), [source.variable, *gains], [(shape, "float32")])
    return t.view_of(made[0], shape)


def _gated(t: Translator, node: fx.Node) -> View:
    gate, up = t.rows(node.args[0]), t.rows(node.args[1])
    shape = gate.layout.shape
    made = t.kernel(
        lambda s: gated_activation(str(node.args[2]), s.layout(gate.layout), s.layout(up.layout)),
        [gate.variable, up.variable],
        [(shape, "float32")],
    )
    return t.view_of(made[0], shape)


def _embedding(t: Translator, node: fx.Node) -> View:
    indices, weight, scale, zero, format, group_size, width, _ = node.args
    rows = int(scale.meta["val"].shape[0]) * ROWS
    table = Linear(rows, int(width), str(format), int(group_size), zero is not None, dtype_of(scale.meta["val"]))
    return _looked_up(t, node, indices, table, [part for part in (weight, scale, zero) if part is not None])


def _float_embedding(t: Translator, node: fx.Node) -> View:
    indices, weight, rows = node.args
    width = int(node.meta["val"].shape[-1])
    return _looked_up(t, node, indices, Linear(int(rows), width, "float32", width), [weight])


def _looked_up(t: Translator, node: fx.Node, indices: Any, table: Linear, stored: list[Any]) -> View:
    shape = shape_of(node.meta["val"], t.fixed)
    inputs = [t.dense(indices), *map(t.weight, stored)]
    made = t.kernel(lambda s: embedding(table, [s.dim(size) for size in shape[:-1]]), inputs, [(shape, "float32")])
    return t.view_of(made[0], shape)


def _table(t: Translator, rope: fx.Node) -> tuple[rope_kernels.Rotation, Layout, list[relax.Expr]]:
    """What turns a tensor: the rotation, where positions lie in the table, and the table, which layers share."""
    given = arguments(rope)
    positions, inv_freq, scaling = given["positions"], given["inv_freq"], given["scaling"]
    half = inv_freq.meta["val"].shape[0]
    at = t.view(positions, "int64")
    key = (positions, str(inv_freq.target), scaling)
    if key not in t.tables:
        shape = ((*at.layout.shape, half), "float32")
        cos, sin = t.kernel(
            lambda s: rope_kernels.table(s.layout(at.layout), half, scaling),
            [at.variable, t.view(inv_freq, "float32").variable],
            [shape, shape],
        )
        t.tables[key] = (cos, sin)
    return rope_kernels.Rotation(half, given["interleaved"]), Layout.contiguous(at.layout.shape), list(t.tables[key])


def _rope(t: Translator, node: fx.Node) -> View:
    source = t.rows(node.args[0])
    rotation, positions, table = _table(t, node)
    batch, heads, length, head_dim = source.layout.shape
    shape = (batch, length, heads, head_dim)
    made = t.kernel(
        lambda s: rope_kernels.rotate(rotation, s.layout(source.layout), s.layout(positions)),
        [source.variable, *table],
        [(shape, "float32")],
    )
    return View(made[0], transpose(Layout.contiguous(shape), (0, 2, 1, 3)), "float32")


def _update(t: Translator, node: fx.Node) -> None:
    cache_node, new, slots_node = node.args
    rope = t.fusion.rope.get(node)
    rotation, positions, table = _table(t, rope) if rope else (rope_kernels.Rotation(), None, [])
    rounding, scale_update = t.fusion.codes.get(node, (None, None))
    source = t.rows(rope.args[0] if rope else rounding.args[0] if rounding else new)
    slots = t.view(slots_node, "int64")
    if scale_update is not None:
        codes, scale = t.view(cache_node, "int8"), t.view(scale_update.args[0], "float32")
        t.update(
            lambda s: rope_kernels.update_codes(
                rotation,
                s.layout(source.layout),
                s.layout(codes.layout),
                s.layout(scale.layout),
                s.layout(slots.layout),
                s.layout(positions) if positions else None,
            ),
            [source.variable, slots.variable, *table, codes.variable, scale.variable],
        )
        return
    cache = t.view(cache_node)
    if cache.dtype not in CACHED:
        raise BackendError(
            f"The TVM kernels write caches in {' or '.join(CACHED)}, and this one holds {cache.dtype}",
            where=describe(node),
            fix="Use backend='inductor'",
        )

    def build(s: Sizes) -> tirx.PrimFunc:
        return rope_kernels.update_cache(
            rotation,
            s.layout(source.layout),
            s.layout(cache.layout),
            s.layout(slots.layout),
            s.layout(positions) if positions else None,
            cache.dtype,
        )

    t.update(build, [source.variable, slots.variable, *table, cache.variable])


def _held(t: Translator, node: fx.Node) -> tuple[View, View | None]:
    """Keys or values, and the scales of those that are codes."""
    if node not in t.fusion.held:
        return t.rows(node, "float16" if t.view(node).dtype == "float16" else "float32"), None
    return t.view(node.args[0], "int8"), t.view(node.args[1], "float32")


def _dequantize(t: Translator, node: fx.Node) -> View:
    codes, scale = t.view(node.args[0], "int8"), t.view(node.args[1], "float32")
    shape = codes.layout.shape
    made = t.kernel(
        lambda s: dequantize_tokens(s.layout(codes.layout), s.layout(scale.layout)),
        [codes.variable, scale.variable],
        [(shape, "float32")],
    )
    return t.view_of(made[0], shape)


ATTENTION_OPTIONS = ("scale", "causal", "window", "chunk", "prefix", "softcap", "anchors", "block")


def _attention(t: Translator, node: fx.Node) -> View:
    values = arguments(node)
    if values["bias"] is not None:
        raise BackendError("The TVM attention kernels take no bias", where=describe(node), fix="Use backend='inductor'")
    query = t.rows(values["query"])
    (key, key_scale), (value, value_scale) = (_held(t, values[name]) for name in ("key", "value"))
    places = [t.view(values[n], "int64") if values[n] else None for n in ("query_positions", "key_positions")]
    batch, heads, length, head_dim = query.layout.shape
    kv_heads, value_dim = key.layout.shape[1], value.layout.shape[3]
    slopes, sinks = values["alibi_slopes"], values["sinks"]
    described = attention_kernels.Attention(
        heads,
        kv_heads,
        head_dim,
        value_dim,
        alibi=slopes is not None,
        sinks=sinks is not None,
        **{name: values[name] for name in ATTENTION_OPTIONS},
    )

    def operands(s: Sizes) -> attention_kernels.Operands:
        def layout(view: View | None) -> Layout | None:
            return s.layout(view.layout) if view else None

        return attention_kernels.Operands(
            s.layout(query.layout),
            s.layout(key.layout),
            s.layout(value.layout),
            layout(places[0]),
            layout(places[1]),
            key_scale=layout(key_scale),
            value_scale=layout(value_scale),
            key_dtype=key.dtype,
            value_dtype=value.dtype,
        )

    inputs = [v.variable for v in (query, key, value, key_scale, value_scale, *places) if v is not None]
    inputs += [t.view(part, "float32").variable for part in (slopes, sinks) if part is not None]
    shape = (batch, length, heads, value_dim)
    outputs: list[tuple[Sequence[Any], str]] = [(shape, "float32")]
    parts = max(1, -(-KEY_PARTS // kv_heads))
    if length == 1 and batch == 1:
        outputs.append(((batch, kv_heads, parts, described.group, value_dim + 2), "float32"))
        made = t.kernel(lambda s: attention_kernels.decode(described, operands(s), parts), inputs, outputs)
    else:
        prefill: Callable[..., Any] = partial(attention_vectors.prefill, lanes=t.isa.lanes)
        # Products of bfloat16 parts lack a little of float32, which counts where activations keep all of it.
        if t.isa.tiles and attention_tiles.serves(described) and any(t.program.calls(ops.quantize_dequantize.target)):
            prefill = attention_tiles.prefill
        made = t.kernel(lambda s: prefill(described, operands(s), parts), inputs, outputs)
    return View(made[0], transpose(Layout.contiguous(shape), (0, 2, 1, 3)), "float32")


def _routing(t: Translator, node: fx.Node) -> list[View]:
    given = arguments(node)
    logits, bias = given["logits"], given["correction_bias"]
    *_, rows, count = shape_of(logits.meta["val"], t.fixed)
    chosen = ("top_k", "scoring", "normalize", "scaling", "num_groups", "top_groups")
    names = (*chosen, "skip_ratio", "num_shared", "first_shared")
    stored, shared = given["expert_of"], given["shared_weight"]
    described = Routing(
        int(count), corrected=bias is not None, mapped=stored is not None, shared_weighted=shared is not None,
        **{name: given[name] for name in names},
    )  # fmt: skip
    inputs = [t.dense(logits), *([] if bias is None else [t.view(bias, "float32").variable])]
    inputs += [] if stored is None else [t.view(stored, "int64").variable]
    inputs += [] if shared is None else [t.dense(shared)]
    shape = (rows, described.choices)
    made = t.kernel(lambda s: route(described, s.dim(rows)), inputs, [(shape, "float32"), (shape, "int64")])
    return [t.view_of(made[0], shape), t.view_of(made[1], shape, "int64")]


def _capacity(t: Translator, node: fx.Node) -> list[View]:
    given = arguments(node)
    count, sources = int(given["num_experts"]), [given["weights"], given["indices"]]
    shape = shape_of(sources[0].meta["val"], t.fixed)
    limit = Limit(count, given["capacity"], ratio(given["factor"]), given["round_up"])
    made = t.kernel(
        lambda s: limit_choices([s.dim(size) for size in shape], limit),
        [t.dense(part) for part in sources],
        [(shape, "float32"), (shape, "int64"), ((count,), "int64")],
    )
    return [t.view_of(made[0], shape), t.view_of(made[1], shape, "int64"), t.view_of(made[2], (count,), "int64")]


def _expert_choice(t: Translator, node: fx.Node) -> list[View]:
    given = arguments(node)
    shape = shape_of(given["logits"].meta["val"], t.fixed)
    limit = Limit(int(shape[-1]), given["capacity"], ratio(given["factor"]), given["round_up"])
    made = t.kernel(
        lambda s: choose_tokens([s.dim(size) for size in shape], limit),
        [t.dense(given["logits"])],
        [(shape, "float32"), (shape, "int64"), (shape, "float32")],
    )
    return [t.view_of(made[0], shape), t.view_of(made[1], shape, "int64")]


def _fetch(t: Translator, node: fx.Node) -> View:
    """Calls the store of experts, and passes the indices on."""
    given = arguments(node)
    inputs = [t.dense(given[name]) for name in ("indices", "guess") if given[name] is not None]
    name = relax.ExternFunc(f"{FETCH}.{given['layer']}")
    t.builder.emit(relax.Call(name, inputs, ty_args=[relax.TupleType([])]))
    return t.view(given["indices"])


def _experts(t: Translator, node: fx.Node) -> View:
    """Sorts the choices, multiplies with `up` and `down` of the active experts, and sums for each token."""
    given = arguments(node)
    tokens, width = shape_of(given["x"].meta["val"], t.fixed)
    top_k, count = int(given["indices"].meta["val"].shape[1]), int(given["num_experts"])
    inner, outputs, choices = int(given["inner_features"]), int(given["out_features"]), tokens * top_k
    rows = up_rows(inner, given["gated"])
    plan = t.kernel(
        lambda s: sort_choices(s.dim(tokens), top_k, s.dim(choices), count),
        [t.dense(given["indices"])],
        [((choices,), "int32"), ((count + 1,), "int32"), ((count + 1,), "int32")],
    )
    names = ("activation", "gated", "alpha", "limit")
    up = _expert_weights(t, given, "up", rows, width)
    up = (replace(up[0], **{name: given[name] for name in names}), *up[1:])
    down = _expert_weights(t, given, "down", outputs, inner)

    def product(source: Any, rows: Any, row_size: int, weights: Any, gathered: int) -> relax.Expr:
        layer, stored, bias = weights
        return t.kernel(
            lambda s: expert_linear(layer, count, (s.dim(rows), row_size), s.dim(choices), gathered, t.isa.lanes),
            [source, *stored, *plan, *bias],
            [((choices, layer.width), "float32")],
        )[0]

    middle = product(t.dense(given["x"]), tokens, width, up, top_k)
    outer = product(middle, choices, up[0].width, down, 0)
    made = t.kernel(
        lambda s: combine(s.dim(tokens), s.dim(choices), top_k, outputs),
        [outer, t.dense(given["weights"]), t.dense(given["indices"])],
        [((tokens, outputs), "float32")],
    )
    return t.view_of(made[0], (tokens, outputs))


def _expert_weights(
    t: Translator, given: Mapping[str, Any], name: str, rows: int, width: int
) -> tuple[Linear, list[relax.Expr], list[relax.Expr]]:
    """One product for its kernel, and the variables that hold its weight and its bias."""
    scale, zero, bias = (given[f"{name}_{part}"] for part in ("scale", "zero_point", "bias"))
    group_size = width if scale is None else int(given[f"{name}_group_size"])
    scale_dtype = "" if scale is None else dtype_of(scale.meta["val"])
    layer = Linear(rows, width, given["format"], group_size, zero is not None, scale_dtype, bias is not None)
    stored = [t.weight(part) for part in (given[name], scale, zero) if part is not None]
    return layer, stored, [] if bias is None else [t.view(bias, "float32").variable]


KERNELS: Mapping[Any, Callable[[Translator, fx.Node], Any]] = {
    tiled_linear.target: _linear,
    tiled_float_linear.target: _linear,
    tiled_sparse_linear.target: _linear,
    tiled_embedding.target: _embedding,
    tiled_float_embedding.target: _float_embedding,
    tiled_experts.target: _experts,
    ops.attention.target: _attention,
    ops.dequantize_tokens.target: _dequantize,
    ops.expert_capacity.target: _capacity,
    ops.expert_choice.target: _expert_choice,
    ops.fetch_experts.target: _fetch,
    ops.gated_activation.target: _gated,
    ops.kv_cache_update.target: _update,
    ops.moe_routing.target: _routing,
    ops.rope.target: _rope,
    **dict.fromkeys(NORMS, _normalize),
}
"""Ops with kernels of their own."""
