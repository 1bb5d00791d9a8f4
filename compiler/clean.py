"""The normal form of a graph: one spelling for what several spellings mean, and no noise from capturing.

    no-op casts, moves, aliases, clones, dropout(p=0), metadata asserts    gone
    to.device, to.dtype_layout, type_as, _to_copy, float …                 to.dtype, only where the dtype changes
    view, _unsafe_view, contiguous                                         reshape, nothing
    baddbmm(c, a, b, beta, alpha)                                          bmm(a, b) * alpha + c * beta
    einsum of a batched product, "bhid,bhjd->bhij"                         matmul, of a transpose
    __and__, bitwise_and, logical_and on bool                              logical_and    (the same for or, not)
    equal nodes with equal arguments, weights read twice                   one node
    dead nodes                                                             gone

`clean` assumes a functional graph: `capture` makes it one before.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.shapes import compute, mode_of

aten = torch.ops.aten

DROPPED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
"""Nodes without a value that only assert what shapes already say."""

IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
}
"""Nodes whose value is their first argument, in a functional graph."""

CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
}

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}

BOOLEAN = {
    aten.__and__.Tensor: aten.logical_and.default,
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
    aten.bitwise_not.default: aten.logical_not.default,
}
"""Bitwise ops that are logical ones when their arguments are bool."""


def clean(module: fx.GraphModule) -> int:
    """Brings `module` into normal form in place; returns how many nodes went away."""
    before = len(module.graph.nodes)
    changing = written(module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and not changing.intersection(node.all_input_nodes):
            _simplify(node, module)
    _merge_equal(module, changing)
    module.graph.eliminate_dead_code(is_impure_node=is_impure)
    module.graph.lint()
    module.recompile()
    return before - len(module.graph.nodes)


def written(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose memory some node writes: they and all views of them hold different values at different times."""
    bases = set()
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                    bases.add(base_of(value))
    changing = set(bases)
    for node in module.graph.nodes:
        if _is_view(node) and node.args[0] in changing:
            changing.add(node)
    return changing


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem or node.target in IDENTITIES or node.target in RESHAPES:
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.arguments and schema.arguments[0].alias_info is not None)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows; itself for any other."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_impure(node: fx.Node) -> bool:
    """Whether a node must stay although nothing uses its value: inputs, outputs, writes into state."""
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _simplify(node: fx.Node, module: fx.GraphModule) -> None:
    if node.target in DROPPED:
        module.graph.erase_node(node)
    elif node.target in IDENTITIES or _is_idle_dropout(node):
        node.replace_all_uses_with(node.args[0])
    elif node.target in CASTS:
        _simplify_cast(node)
    elif node.target in RESHAPES:
        node.target = aten.reshape.default
    elif node.target is aten.expand.default and _same_shape(node):
        node.replace_all_uses_with(node.args[0])
    elif node.target in BOOLEAN and node.meta["val"].dtype == torch.bool:
        node.target = BOOLEAN[node.target]
    elif node.target is operator.getitem and isinstance(node.args[0], (list, tuple)):
        node.replace_all_uses_with(node.args[0][node.args[1]])
    elif node.target is aten.baddbmm.default:
        _split_baddbmm(node, module)
    elif node.target is aten.einsum.default:
        _split_einsum(node, module)


def _insert(node: fx.Node, module: fx.GraphModule, target: Any, *args: Any) -> fx.Node:
    """A call before `node` that comes from the same place."""
    with module.graph.inserting_before(node):
        new = module.graph.call_function(target, args)
    new.meta = {**node.meta, "val": compute(new, mode_of(module.graph), module)}
    return new


def _split_baddbmm(node: fx.Node, module: fx.GraphModule) -> None:
    """Writes baddbmm as product, scale and sum; its shape function moreover fails on symbolic sizes (torch 2.13)."""
    added, left, right = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product = _insert(node, module, aten.bmm.default, left, right)
    if alpha != 1:
        product = _insert(node, module, aten.mul.Tensor, product, alpha)
    if beta not in (0, 1):
        added = _insert(node, module, aten.mul.Tensor, added, beta)
    node.replace_all_uses_with(_insert(node, module, aten.add.Tensor, product, added) if beta else product)


def _split_einsum(node: fx.Node, module: fx.GraphModule) -> None:
    """Writes an einsum of two operands as a matmul, if all dimensions but the last two are a common batch."""
    equation, operands = node.args[:2]
    inputs, _, result = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    same_batch = left[:-2] == right[:-2] == result[:-2] and len(left) == len(right) == len(result) > 2
    letters = {left[-2:-1], left[-1:], *right[-2:]} - set(left[:-2])
    if not same_batch or len(operands) != 2 or len(letters) != 3 or result[-2:-1] != left[-2:-1]:
        return
    if right[-1] == left[-1] and result[-1] == right[-2]:
        transposed = _insert(node, module, aten.transpose.int, operands[1], -2, -1)
        node.replace_all_uses_with(_insert(node, module, aten.matmul.default, operands[0], transposed))
    elif right[-2] == left[-1] and result[-1] == right[-1]:
        node.replace_all_uses_with(_insert(node, module, aten.matmul.default, operands[0], operands[1]))


def _is_idle_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and bool(node.args[1] == 0 or node.args[2] is False)


def _simplify_cast(node: fx.Node) -> None:
    source = node.args[0]
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        node.replace_all_uses_with(source)
        return
    node.target, node.args, node.kwargs = aten.to.dtype, (source, dtype), {}


def _same_shape(node: fx.Node) -> bool:
    source = node.args[0].meta["val"].shape
    result = node.meta["val"].shape
    return len(source) == len(result) and all(str(a) == str(b) for a, b in zip(source, result, strict=True))


def _merge_equal(module: fx.GraphModule, changing: set[fx.Node]) -> None:
    """Common subexpressions, weights included; nodes that write, draw random numbers or read changing memory stay."""
    seen: dict[Any, fx.Node] = {}
    storages: dict[Any, str] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            node.target = storages.setdefault(_tensor_key(module, str(node.target)), node.target)
        elif node.op != "call_function" or not _is_pure(node) or changing.intersection((node, *node.all_input_nodes)):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)


def _tensor_key(module: fx.GraphModule, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        return name
    return (value.data_ptr() or name, value.dtype, tuple(value.shape), tuple(value.stride()))


def _is_pure(node: fx.Node) -> bool:
    target: Callable[..., Any] | Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return (type(value).__name__, value)


def refresh(module: fx.GraphModule) -> None:
    """Fills in `meta["val"]` of nodes that lack it."""
    mode = mode_of(module.graph)
    for node in module.graph.nodes:
        if node.op in ("call_function", "get_attr") and node.meta.get("val") is None:
            node.meta["val"] = compute(node, mode, module)
