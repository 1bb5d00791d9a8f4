"""Linear layers that read the same input become one: q, k and v, or gate and up, are a single matrix product.

    before                        after
    q = linear(x, Wq)             qkv = linear(x, cat([Wq, Wk, Wv]))
    k = linear(x, Wk)             q, k, v = qkv[..., :a], qkv[..., a:b], qkv[..., b:]
    v = linear(x, Wv)

Fewer, larger products and one pass over the input; rows are independent, so row-wise and group-wise quantization of
the merged matrix gives the same codes.
"""

from collections import defaultdict

import torch
from torch import fx

from graphwright import structure
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


class MergeLinear(Pass):
    """Concatenates the weights of sibling linear layers."""

    name = "merge_linear"
    kind = "exact"
    requires = ("linear",)
    after = ("float_dtype", "rope", "attention", "gated_activation", "pruned", "fewer_layers")
    provides = ("merged_linear",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Merges every group of siblings that agree in bias and dtype and own their weights."""
        with Editor(program, self.name, context.fuel) as editor:
            for siblings in _groups(program):
                if editor.allow(siblings[0][0]):
                    _merge(editor, siblings)
        return PassResult(program, editor.sites)


def _groups(program: Program) -> list[list[tuple[fx.Node, fx.Node]]]:
    groups: dict[tuple[object, ...], list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for node, weight in structure.linears(program):
        bias = node.args[2] if len(node.args) > 2 else None
        owned = len(weight.users) == 1 and (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr"))
        if owned:
            groups[(node.args[0], bias is None, weight.meta["val"].dtype)].append((node, weight))
    return [group for group in groups.values() if len(group) > 1]


def _merge(editor: Editor, siblings: list[tuple[fx.Node, fx.Node]]) -> None:
    first, first_weight = siblings[0]
    program = editor.program
    merged = [torch.cat([program.weight(weight) for _, weight in siblings])]
    if len(first.args) > 2:
        merged.append(torch.cat([program.weight(node.args[2]) for node, _ in siblings]))
    stored = [editor.weight(f"{first_weight.target}_merged", tensor, before=first) for tensor in merged]
    product = editor.call(aten.linear.default, first.args[0], *stored, before=first)
    start = 0
    for node, weight in siblings:
        end = start + int(weight.meta["val"].shape[0])
        part = editor.call(aten.slice.Tensor, product, -1, start, end, before=first)
        editor.replace(node, part, str(weight.target))
        start = end
