"""ATen operators without a kernel of their own, by TVM's converters for single operators."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from graphwright.backends.tvm.values import Sizes, size_of
from graphwright.errors import BackendError
from graphwright.match import arguments
from graphwright.rewrite import describe


class Leftovers:
    """Converts one node at a time into the function that `builder` is at."""

    def __init__(self, builder: relax.BlockBuilder, value_of: Callable[[fx.Node], Any]) -> None:
        self._importer = ExportedProgramImporter()
        self._importer.block_builder = builder
        self._importer.env = _Values(value_of)
        self._importer.update_convert_map({name: getattr(self, method) for name, method in OWN.items()})

    def convert(self, node: fx.Node) -> relax.Expr:
        """The value of a node.

        Raises:
            BackendError: TVM has no converter, or it refuses this use.
        """
        name = converter_name(node)
        if name not in known():
            raise BackendError(f"TVM has no converter for {name}", where=describe(node), fix="Use backend='inductor'")
        try:
            return self._importer.convert_map[name](node)
        except Exception as error:
            raise BackendError(
                f"TVM cannot convert {name}: {type(error).__name__}: {error}",
                where=describe(node),
                fix="Use backend='inductor'",
            ) from error

    def _clamp(self, node: fx.Node) -> relax.Expr:
        """TVM's own converter takes infinity for a bound that is absent, which integers do not have."""
        x, low, high = (*node.args, None, None)[:3]
        result = self._importer.env[x]
        dtype = _dtype(node)
        if low is not None:
            result = relax.op.maximum(result, relax.const(low, dtype))
        if high is not None:
            result = relax.op.minimum(result, relax.const(high, dtype))
        return self._importer.block_builder.emit(result)

    def _where_scalar(self, node: fx.Node) -> relax.Expr:
        condition, kept, other = node.args
        value = self._importer.env[kept]
        scalar = relax.const(other, _dtype(node))
        return self._importer.block_builder.emit(relax.op.where(self._importer.env[condition], value, scalar))

    def _smallest(self, node: fx.Node) -> relax.Expr:
        return self._extreme(node, relax.op.min)

    def _largest(self, node: fx.Node) -> relax.Expr:
        return self._extreme(node, relax.op.max)

    def _extreme(self, node: fx.Node, operator: Callable[..., relax.Expr]) -> relax.Expr:
        given = arguments(node)
        axes = [int(dim) for dim in given["dim"]] or None
        made = operator(self._importer.env[given["self"]], axis=axes, keepdims=bool(given["keepdim"]))
        return self._importer.block_builder.emit(made)

    def _index(self, node: fx.Node) -> relax.Expr:
        """Rows along one dimension; TVM's own converter takes no index from the end."""
        source, indices = node.args
        given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        if len(given) != 1 or given[0][1].meta["val"].dtype == torch.bool:
            raise NotImplementedError("indexing by several tensors, or by a mask")
        dim, index = given[0]
        data, places, dtype = self._importer.env[source], self._importer.env[index], _dtype(index)
        size = data.ty.shape[dim]
        if not isinstance(size, tirx.IntImm):
            raise NotImplementedError("indexing along a symbolic dimension")
        zero, whole = relax.const(0, dtype), relax.const(int(size), dtype)
        wrapped = relax.op.where(relax.op.less(places, zero), relax.op.add(places, whole), places)
        return self._importer.block_builder.emit(relax.op.take(data, wrapped, axis=dim))


OWN = {
    "clamp.default": "_clamp",
    "where.ScalarOther": "_where_scalar",
    "amin.default": "_smallest",
    "amax.default": "_largest",
    "index.Tensor": "_index",
}
"""Converters of this module by the name of what they convert."""


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


UNSCHEDULED = frozenset(
    f"{name}.default"
    for name in (
        *("addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "scaled_dot_product_attention"),
        *("conv1d", "conv2d", "conv3d", "convolution"),
    )
)
"""Products that TVM converts to loops nobody has tiled, many times slower than a library's."""


def refusal(node: fx.Node) -> str:
    """Why TVM's converters cannot take a node, found by letting them try; empty where they can."""
    name = converter_name(node)
    if name not in known():
        return f"TVM has no converter for {name}"
    if name in UNSCHEDULED:
        return f"TVM has no fast kernel for {name}"
    if not isinstance(node.meta.get("val"), torch.Tensor) or node.target is operator.getitem:
        return ""
    sizes, builder = Sizes(), relax.BlockBuilder()
    try:
        values = {source: _stand_in(source, sizes) for source in node.all_input_nodes}
        variables = [value for value in values.values() if isinstance(value, relax.Var)]
    except BackendError as error:
        return error.problem
    with builder.function("attempt", variables):
        reason, made = "", relax.Tuple([])
        try:
            made = Leftovers(builder, values.__getitem__).convert(node)
        except BackendError as error:
            reason = error.problem
        # A builder that is left in the middle of a function complains on the terminal.
        builder.emit_func_output(made)
    return reason


def _stand_in(node: fx.Node, sizes: Sizes) -> Any:
    """A variable of the type of a node's value, or its symbolic size."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return relax.Var(node.name, relax.TensorType([sizes(size_of(s, {})) for s in value.shape], _dtype(node)))
    return sizes(size_of(value, {}))


class _Values(dict[fx.Node, Any]):
    """The values that converters look up, made when they are asked for."""

    def __init__(self, value_of: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self._value_of = value_of

    def __missing__(self, node: fx.Node) -> Any:
        return self._value_of(node)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node)


def converter_name(node: fx.Node) -> str:
    """What TVM's table of converters calls the target of a node."""
    target: Any = node.target
    return str(target.__name__) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")


@functools.cache
def known() -> frozenset[str]:
    """Names of all converters."""
    return frozenset(name for name in ExportedProgramImporter().convert_map if isinstance(name, str)) | set(OWN)
