"""Raising matrix products with a constant weight to one form, linear(x, W[N, K], bias).

    before                                            after
    y = reshape(addmm(b, reshape(x), W), sizes)       y = linear(x, W.T, b)             GPT-2
    y = matmul(x, permute(W, [1, 0]))                 y = linear(x, W)                  Falcon

A weight that is used the other way round is transposed once, at compile time. Batched expert weights are not linear
layers and stay.
"""

import torch
from torch import fx

from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.permute.default, aten.transpose.int}


class RaiseLinear(Pass):
    """Finds matmul, mm and addmm with a weight matrix."""

    name = "raise_linear"
    kind = "exact"
    provides = ("linear",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces products whose second factor is a weight, plain or transposed."""
        transposed: dict[str, str] = {}
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.calls(aten.matmul.default, aten.mm.default):
                _raise(editor, node, node.args[0], node.args[1], None, transposed)
            for node in program.calls(aten.addmm.default):
                bias, x, weight = node.args[:3]
                if not node.kwargs and isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1:
                    _raise(editor, node, x, weight, bias, transposed)
        return PassResult(program, editor.sites)


def _raise(
    editor: Editor, node: fx.Node, x: object, weight: object, bias: fx.Node | None, transposed: dict[str, str]
) -> None:
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or x.op == "get_attr":
        return
    source, flipped = _origin(weight)
    if source is None or not editor.allow(node):
        return
    matrix = source if flipped else _transposed(editor, source, node, transposed)
    root, wide = _unfolded(node, x)
    args = (wide, matrix) if bias is None else (wide, matrix, bias)
    editor.replace(root, editor.call(aten.linear.default, *args, before=root), str(source.target))


def _origin(weight: fx.Node) -> tuple[fx.Node | None, bool]:
    """The weight matrix behind a factor, and whether the factor is its transpose."""
    flipped = weight.target in TRANSPOSES and weight.meta["val"].dim() == 2
    if flipped and weight.target is aten.permute.default and list(weight.args[1]) not in ([1, 0], [-1, -2]):
        return None, False
    source = weight.args[0] if flipped else weight
    if not isinstance(source, fx.Node) or source.op != "get_attr" or source.meta["val"].dim() != 2:
        return None, False
    return source, flipped


def _transposed(editor: Editor, source: fx.Node, before: fx.Node, made: dict[str, str]) -> fx.Node:
    name = str(source.target)
    if name not in made:
        tensor = editor.program.weight(source).t().contiguous()
        made[name] = str(editor.weight(f"{name}_transposed", tensor, before=before).target)
    return editor.read(made[name], before=before)


def _unfolded(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Looks through reshape(product(reshape(x, [-1, K])), [..., N]) to the wide input and the outer node."""
    users = list(node.users)
    outer = users[0] if len(users) == 1 and users[0].target is aten.reshape.default else None
    inner = x.args[0] if x.target is aten.reshape.default else None
    if outer is None or not isinstance(inner, fx.Node):
        return node, x
    wide, result = inner.meta["val"].shape, outer.meta["val"].shape
    features = node.meta["val"].shape[-1]
    fits = len(wide) == len(result) and str(wide[:-1]) == str(result[:-1]) and str(result[-1]) == str(features)
    same_width = str(wide[-1]) == str(x.meta["val"].shape[-1])
    return (outer, inner) if fits and same_width else (node, x)
