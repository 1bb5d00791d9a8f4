"""Raising tensors that are written part by part to one concatenation.

    before                                            after
    y = new_empty(x, [B, H, S, 24])                   y = cat([nope, rope], 3)          DeepSeek
    y[..., :16] = nope                                before a pass expands `rope` to its sizes
    y[..., 16:] = rope

In an exported graph, writes are `slice_scatter`. They are a concatenation if together they write every place of a new
tensor, one part after the other along one dimension.
"""

import torch
from torch import fx

from graphwright.match import argument
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

NEW = {aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default, aten.new_zeros.default}


class RaiseConcat(Pass):
    """Finds chains of `slice_scatter` that fill a new tensor."""

    name = "raise_concat"
    kind = "exact"
    provides = ("concat",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every such chain by one concatenation of what it writes."""
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.calls(aten.slice_scatter.default):
                parts = _parts(node)
                if parts and editor.allow(node):
                    _concatenate(editor, node, parts)
        return PassResult(program, editor.sites)


def _parts(last: fx.Node) -> list[fx.Node]:
    """What is written, in the order of the places; nothing if `last` is not the end of a filled tensor."""
    dim = _dim(last)
    if any(user.target is aten.slice_scatter.default and user.args[0] is last for user in last.users):
        return []
    written: dict[int, tuple[int, fx.Node]] = {}
    node: object = last
    while isinstance(node, fx.Node) and node.target is aten.slice_scatter.default:
        start, end, step = (argument(node, name) for name in ("start", "end", "step"))
        size = node.meta["val"].shape[dim]
        if _dim(node) != dim or step != 1 or not isinstance(size, int):
            return []
        bounds = [0 if start is None else start, size if end is None else end]
        if not all(isinstance(bound, int) for bound in bounds):
            return []
        first, stop = (min(b + size if b < 0 else b, size) for b in bounds)
        written.setdefault(first, (stop, argument(node, "src")))
        node = argument(node, "self")
    if not isinstance(node, fx.Node) or node.target not in NEW:
        return []
    at, parts = 0, []
    while at in written and written[at][0] > at:
        at, part = written[at]
        parts.append(part)
    return parts if at == last.meta["val"].shape[dim] and len(parts) == len(written) else []


def _dim(node: fx.Node) -> int:
    return int(argument(node, "dim")) % node.meta["val"].dim()


def _concatenate(editor: Editor, node: fx.Node, parts: list[fx.Node]) -> None:
    values = [_written(editor, node, part) for part in parts]
    editor.replace(node, editor.call(aten.cat.default, values, _dim(node), before=node), f"{len(values)} parts")


def _written(editor: Editor, node: fx.Node, part: fx.Node) -> fx.Node:
    """What stands behind a copy into the new tensor, in its dtype."""
    source = part.args[1] if part.target is aten.copy.default else part
    if not isinstance(source, fx.Node) or list(source.meta["val"].shape) != list(part.meta["val"].shape):
        return part  # a smaller tensor or a number was broadcast
    dtype = node.meta["val"].dtype
    return source if source.meta["val"].dtype == dtype else editor.call(aten.to.dtype, source, dtype, before=node)
