"""Linear layers that read the same input become one: q, k and v, or gate and up, are a single matrix product.

    before                        after
    q = linear(x, Wq)             qkv = linear(x, cat([Wq, Wk, Wv]))
    k = linear(x, Wk)             q, k, v = qkv[..., :a], qkv[..., a:b], qkv[..., b:]
    v = linear(x, Wv)

Fewer, larger products and one pass over the input; rows are independent, so row-wise and group-wise quantization of
the merged matrix gives the same codes. Layers that hold codes already are merged by their codes, scales and zero
points, where their formats agree.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from graphwright import structure
from graphwright.ops import quantized_linear
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

ROWS = {aten.linear.default: (1, 2), quantized_linear.target: (1, 2, 3, 4)}
"""Which arguments of a layer have one row per output: its weight first, and what goes with it."""


class MergeLinear(Pass):
    """Concatenates the weights of sibling linear layers."""

    name = "merge_linear"
    kind = "exact"
    requires = ("linear",)
    after = ("float_dtype", "rope", "attention", "gated_activation", "pruned", "fewer_layers")
    provides = ("merged_linear",)
    replaces_weights = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Merges every group of siblings that agree in bias, dtype and format and own their weights."""
        with Editor(program, self.name, context.fuel) as editor:
            for siblings in _groups(program):
                if editor.allow(siblings[0]):
                    _merge(editor, siblings)
        return PassResult(program, editor.sites)


def _groups(program: Program) -> list[list[fx.Node]]:
    groups: dict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
    floats = [node for node, _ in structure.linears(program)]
    for node in [*floats, *program.calls(quantized_linear.target)]:
        rows = _row_arguments(node)
        stored = all(isinstance(value, fx.Node) and value.op == "get_attr" for value in rows if value is not None)
        if stored and len(rows[0].users) == 1:
            groups[(node.target, node.args[0], *map(_form, rows), *node.args[len(rows) + 1 :])].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _row_arguments(node: fx.Node) -> list[Any]:
    """The layer's weight and what goes with it; None where it has none."""
    return [node.args[place] if place < len(node.args) else None for place in ROWS[node.target]]


def _form(value: fx.Node | None) -> tuple[object, ...] | None:
    """What tensors have to agree in to be concatenated."""
    return None if value is None else (value.meta["val"].dtype, *value.meta["val"].shape[1:])


def _merge(editor: Editor, siblings: list[fx.Node]) -> None:
    first, program = siblings[0], editor.program
    parts = [_row_arguments(node) for node in siblings]
    name = f"{parts[0][0].target}_merged"
    merged: list[fx.Node | None] = []
    for column in zip(*parts, strict=True):
        if column[0] is None:
            merged.append(None)
            continue
        tensor = torch.cat([program.weight(value) for value in column])
        merged.append(editor.weight(name, tensor, before=first))
    if first.target is aten.linear.default and merged[-1] is None:
        merged.pop()
    rest = first.args[len(parts[0]) + 1 :]
    product = editor.call(first.target, first.args[0], *merged, *rest, before=first)
    start = 0
    for node, (weight, *_) in zip(siblings, parts, strict=True):
        end = start + int(weight.meta["val"].shape[0])
        part = editor.call(aten.slice.Tensor, product, -1, start, end, before=first)
        editor.replace(node, part, str(weight.target))
        start = end
    # All layers' old weights beside the merged ones would be the peak of a compile's memory.
    for node in siblings:
        editor.retire(node)
