"""Gathering a mixture of experts in two ops, whatever its spelling.

    before                                                after
    weights, ids = topk(softmax(logits), k) …             weights, ids = moe_routing(logits, None, k, "softmax", True)
    rows = x[sort(ids) // k]                              y = experts(x, weights, ids, up, None, down, None, "silu")
    h = silu(grouped_linear(rows, gate)) * …
    y = sum(grouped_linear(h, down) * weights, 1)

Found are products of sorted rows with stacked weights (`grouped_linear`), of rows with gathered weights (index and
bmm), and stacks that are multiplied whole, as einsum writes them. What a subgraph means is decided by evaluating it:
the middle of the MLP against the known activations, the router against every combination of scoring, groups,
normalization and capacity, and the whole against the op. A router that fits none stays as it is, before the `experts`
op, and is reported.

Experts that a checkpoint holds in codes are the op `quantized_experts` from the beginning; only their router is raised.

It runs after passes that fold scales or rotations into the weights of experts, and before quantization.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.match import argument
from graphwright.ops import expert_capacity, expert_choice, experts, moe_routing, quantized_experts
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe import _mlp, _products, _router, _whole
from graphwright.passes.moe._evaluate import UnknownError, between
from graphwright.passes.moe._mlp import Mlp, stored_tensors
from graphwright.passes.moe._products import Layer, Product
from graphwright.passes.moe._router import Routing
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

ROUTERS = {moe_routing.target, expert_capacity.target, expert_choice.target}


class Experts(Pass):
    """Finds routers and expert MLPs."""

    name = "experts"
    kind = "exact"
    paper = Paper("MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", "Gale et al.", 2022, "2211.15841")
    requires = ("grouped_linear", "gated_activation", "linear")
    after = ("folded",)
    provides = ("experts",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every mixture of experts that is understood; the rest is told with the reason."""
        misses: list[str] = []
        with Editor(program, self.name, context.fuel) as editor:
            for total in program.calls(aten.sum.dim_IntList):
                layer = _products.find_layer(total)
                if layer is not None:
                    _sorted(editor, context, layer, misses)
            for node in program.calls(quantized_experts.target):
                _router_of(editor, context, _quantized(node), misses)
            for logits in program.calls(aten.linear.default):
                _stacked(editor, context, logits, misses)
            misses.extend(_loops(program))
        notes = {"left": misses} if misses else {}
        return PassResult(program, editor.sites, near_misses=misses, notes=notes)


def _sorted(editor: Editor, context: Context, layer: Layer, misses: list[str]) -> None:
    """Raises a layer of sorted rows or gathered weights, and then its router."""
    program = editor.program
    try:
        mlp = _mlp.understood(program, layer, context.generator())
    except UnknownError as reason:
        misses.append(f"the experts at {layer.total.name}: {reason}")
        return
    if not editor.allow(layer.total):
        return
    _install(editor, layer, mlp)
    _router_of(editor, context, _Routed(layer.up.name, layer.weights, layer.indices, mlp.up.shape[0]), misses)


@dataclass(frozen=True)
class _Routed:
    """What a router gives to a layer of experts: weights and choices [tokens, J], of `count` experts."""

    name: str
    weights: fx.Node
    indices: fx.Node
    count: int


def _router_of(editor: Editor, context: Context, layer: _Routed, misses: list[str]) -> None:
    """Raises what stands before a layer of experts."""
    if _is_raised(layer.indices):
        return
    try:
        routing = _router.recognised(editor.program, layer.weights, layer.indices, layer.count, context.generator())
    except UnknownError as reason:
        misses.append(f"the router of {layer.name}: {reason}; it stays as it is")
        return
    if editor.allow(layer.indices):
        _install_routing(editor, layer, routing)


def _quantized(node: fx.Node) -> _Routed:
    """A layer of experts whose weights came in codes."""
    weights, indices, up = (argument(node, name) for name in ("weights", "indices", "up"))
    return _Routed(str(up.target), weights, indices, int(up.meta["val"].shape[0]))


def _stacked(editor: Editor, context: Context, logits: fx.Node, misses: list[str]) -> None:
    """Raises stacks that are multiplied whole behind these logits, if they are those of a router."""
    program, reasons = editor.program, []
    for box in _whole.find_whole(program, logits):
        try:
            mlp = _whole.understood(program, box, context.generator())
        except UnknownError as reason:
            reasons.append(f"the experts at {box.end.name}: {reason}")
            continue
        try:
            routing = _whole.routed(program, box, mlp, context.generator())
        except UnknownError as reason:
            misses.append(f"the router {logits.name} of {box.stacks[0].target}: {reason}; all stays as it is")
            return
        if editor.allow(box.end):
            _install_whole(editor, box, mlp, routing)
        return
    misses.extend(reasons[:1])


def _loops(program: Program) -> list[str]:
    """Loops over experts that capture did not recognise: linear layers on rows that a condition chose."""
    found = []
    for node in program.calls(aten.linear.default):
        rows = node.args[0]
        if isinstance(rows, fx.Node) and rows.target is aten.index.Tensor:
            behind = {n.target for index in rows.args[1] if index is not None for n in between(index, set())}
            if not behind.isdisjoint({aten.nonzero.default, aten.nonzero_numpy.default, aten.where.default}):
                found.append(str(node.args[1]))
    if not found:
        return []
    return [f"{len(found)} linear layers, {found[0]} first, on rows that a condition chose: a loop that stays as it is"]


def _is_raised(node: fx.Node) -> bool:
    """Whether the choices come from a routing op already."""
    while node.target in (operator.getitem, aten.view.default, aten.reshape.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.target in ROUTERS


def _install(editor: Editor, layer: Layer, mlp: Mlp) -> None:
    program, before = editor.program, layer.total
    up, up_bias, down, down_bias = stored_tensors(program, mlp)

    def stored(product: Product, tensor: torch.Tensor) -> fx.Node:
        if product.outputs_first and tensor is program.weight(product.weight):
            return editor.read(product.name, before)
        return editor.weight(f"{product.name}_experts", tensor.contiguous(), before)

    def bias(node: fx.Node | None, tensor: torch.Tensor | None) -> fx.Node | None:
        if node is None or tensor is None:
            return None
        same = tensor is program.weight(node)
        name = str(node.target)
        return editor.read(name, before) if same else editor.weight(f"{name}_experts", tensor.contiguous(), before)

    first = (stored(layer.up, up), bias(mlp.up_bias, up_bias))
    second = (stored(layer.down, down), bias(mlp.down_bias, down_bias))
    rest = (mlp.activation, mlp.gated, mlp.alpha, mlp.limit)
    new = editor.call(experts, layer.x, layer.weights, layer.indices, *first, *second, *rest, before=before)
    new = _as(editor, new, layer.total, before)
    editor.replace(layer.total, new, layer.up.name)


def _install_routing(editor: Editor, layer: _Routed, found: Routing) -> None:
    # Right behind the later of the two nodes, whose users all come after.
    order = {node: place for place, node in enumerate(editor.program.graph.nodes)}
    before = min(layer.weights, layer.indices, key=lambda node: order[node])
    if order[before] < order[found.logits]:
        before = found.logits.next
    weights, indices = _routing(editor, found, before)
    weights = _as(editor, weights, layer.weights, before)
    layer.indices.replace_all_uses_with(indices)
    editor.replace(layer.weights, weights, "router")


def _install_whole(editor: Editor, box: _whole.Whole, mlp: _whole.StackedMlp, found: Routing) -> None:
    before, tensors, name = box.end, mlp.tensors(editor.program), str(mlp.into[0].target)
    weights, indices = _routing(editor, found, before)
    x = (
        box.x
        if box.x.meta["val"].dim() == 2
        else editor.call(aten.reshape.default, box.x, [-1, _last(box.x)], before=before)
    )
    names = ("up", "up_bias", "down", "down_bias")
    stored = [
        None if tensor is None else editor.weight(f"{name}_{part}", tensor.contiguous(), before)
        for part, tensor in zip(names, tensors, strict=True)
    ]
    new = editor.call(experts, x, weights, indices, *stored, mlp.activation, mlp.gated, before=before)
    if box.end.meta["val"].dim() != 2:
        new = editor.call(aten.reshape.default, new, _shape(editor, box.end, box.x, before), before=before)
    editor.replace(box.end, _as(editor, new, box.end, before), name)


def _routing(editor: Editor, found: Routing, before: fx.Node) -> list[fx.Node]:
    """New nodes for the weights [tokens, J] and the indices of a router."""
    call, logits = editor.call, found.logits
    flat = logits
    if logits.meta["val"].dim() != 2:
        flat = call(aten.reshape.default, logits, [-1, _last(logits)], before=before)
    limit = found.limit
    if found.experts_choose and limit is not None:
        both = call(expert_choice, logits if limit.each_sequence else flat, *limit.arguments, before=before)
        parts = [call(operator.getitem, both, place, before=before) for place in (0, 1)]
        return [_flat(editor, part, before) for part in parts]
    bias = None if found.correction_bias is None else editor.read(str(found.correction_bias.target), before)
    rest = (found.top_k, found.scoring, found.normalize, found.scaling, found.num_groups, found.top_groups)
    both = call(moe_routing, flat, bias, *rest, before=before)
    parts = [call(operator.getitem, both, place, before=before) for place in (0, 1)]
    if limit is None:
        return parts
    if limit.each_sequence:
        shape = [*_shape(editor, logits, logits, before)[:-1], found.top_k]
        parts = [call(aten.reshape.default, part, shape, before=before) for part in parts]
    limited = call(expert_capacity, *parts, _last(logits), *limit.arguments, before=before)
    parts = [call(operator.getitem, limited, place, before=before) for place in (0, 1)]
    return [_flat(editor, part, before) for part in parts]


def _last(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _flat(editor: Editor, node: fx.Node, before: fx.Node) -> fx.Node:
    """Rows of the last dimension."""
    if node.meta["val"].dim() == 2:
        return node
    return editor.call(aten.reshape.default, node, [-1, _last(node)], before=before)


def _shape(editor: Editor, node: fx.Node, given: fx.Node, before: fx.Node) -> list[Any]:
    """The shape of a node; sizes that are not known are those of `given` at the same place, and one may be -1."""
    sizes: list[Any] = []
    for axis, size in enumerate(node.meta["val"].shape):
        if isinstance(size, int):
            sizes.append(size)
        elif -1 not in sizes:
            sizes.append(-1)
        else:
            sizes.append(editor.call(aten.sym_size.int, given, axis, before=before))
    return sizes


def _as(editor: Editor, node: fx.Node, old: fx.Node, before: fx.Node) -> fx.Node:
    """The node in the dtype of another one."""
    dtype = old.meta["val"].dtype
    return node if node.meta["val"].dtype == dtype else editor.call(aten.to.dtype, node, dtype, before=before)
