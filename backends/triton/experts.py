"""Mixtures of experts as what has kernels: tokens sorted by expert, and products with one weight per group of rows.

    y = experts(x, weights, ids, up, …)     →     ids, order = sort(ids)
                                                  h = act(grouped_linear(x[order // J], up, ends))
                                                  y = sum over choices of (grouped_linear(h, down, ends) * weights)

No size depends on values, so nothing waits for the device. Choices that were dropped are sorted behind all others, and
`grouped_linear` gives zeros there.
"""

import operator
from typing import Any

import torch
from torch import fx

from graphwright.match import argument
from graphwright.ops import experts, gated_activation, grouped_linear
from graphwright.ops.experts import CLAMPED_SWIGLU
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

PLAIN = {"silu": (aten.silu.default, {}), "relu": (aten.relu.default, {}), "gelu": (aten.gelu.default, {}),
         "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"})}  # fmt: skip


def experts_as_products(program: Program, editor: Editor) -> None:
    """Replaces every call of `experts`."""
    for node in program.calls(experts.target):
        editor.replace(node, _Products(editor, node).result())


class _Products:
    """One layer being written out, before its call."""

    def __init__(self, editor: Editor, node: fx.Node) -> None:
        self.editor, self.node = editor, node
        names = [formal.name for formal in node.target._schema.arguments]
        self.given: dict[str, Any] = {name: argument(node, name) for name in names}
        self.count, self.outputs = (int(self.given[n].meta["val"].shape[d]) for n, d in (("up", 0), ("down", 1)))
        self.top_k = int(self.given["indices"].meta["val"].shape[1])

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.editor.call(target, *args, before=self.node, **kwargs)

    def result(self) -> fx.Node:
        call, given = self.call, self.given
        flat = call(aten.reshape.default, given["indices"], [-1])
        chosen = call(aten.masked_fill.Scalar, flat, call(aten.lt.Scalar, flat, 0), self.count)
        both = call(aten.sort.default, chosen)
        ids, order = (call(operator.getitem, both, place) for place in (0, 1))
        numbers = call(aten.arange.default, self.count, dtype=torch.int64, device=flat.meta["val"].device)
        ends = call(aten.searchsorted.Tensor, ids, numbers, right=True, out_int32=True)
        tokens = call(aten.floor_divide.default, order, self.top_k)
        bias_of = call(aten.clamp.default, ids, None, self.count - 1)
        rows = call(aten.index.Tensor, given["x"], [tokens])
        inner = self._middle(self._product(rows, "up", ends, bias_of))
        outer = self._product(inner, "down", ends, bias_of)
        places = call(aten.sort.default, order)
        back = call(aten.index.Tensor, outer, [call(operator.getitem, places, 1)])
        parts = call(aten.reshape.default, back, [-1, self.top_k, self.outputs])
        shares = call(aten.masked_fill.Scalar, given["weights"], call(aten.lt.Scalar, given["indices"], 0), 0.0)
        wide = [call(aten.to.dtype, part, torch.float32) for part in (parts, call(aten.unsqueeze.default, shares, -1))]
        total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, *wide), [1])
        return call(aten.to.dtype, total, given["x"].meta["val"].dtype)

    def _product(self, rows: fx.Node, name: str, ends: fx.Node, bias_of: fx.Node) -> fx.Node:
        weight = self.call(aten.transpose.int, self.given[name], 1, 2)
        made = self.call(grouped_linear, rows, weight, ends)
        bias = self.given[f"{name}_bias"]
        return made if bias is None else self.call(aten.add.Tensor, made, self.call(aten.index.Tensor, bias, [bias_of]))

    def _middle(self, inner: fx.Node) -> fx.Node:
        activation, call = self.given["activation"], self.call
        if not self.given["gated"]:
            target, options = PLAIN[activation]
            return call(target, inner, **options)
        width = int(inner.meta["val"].shape[1]) // 2
        gate, up = (call(aten.slice.Tensor, inner, 1, at, at + width) for at in (0, width))
        if activation != CLAMPED_SWIGLU:
            return call(gated_activation, gate, up, activation)
        limit, alpha = self.given["limit"], self.given["alpha"]
        gate, up = call(aten.clamp.default, gate, None, limit), call(aten.clamp.default, up, -limit, limit)
        swish = call(aten.mul.Tensor, gate, call(aten.sigmoid.default, call(aten.mul.Tensor, gate, alpha)))
        return call(aten.mul.Tensor, call(aten.add.Tensor, up, 1), swish)
