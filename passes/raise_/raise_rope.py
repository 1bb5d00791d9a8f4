"""Raising rotary position embedding, in every spelling whose table can be proved.

    before                                                     after
    cos, sin = table(positions, inv_freq)                      y = rope(x, positions, inv_freq)
    y = x * cos + cat([-x[..., h:], x[..., :h]]) * sin

Also: halves split first and rotated one by one (GPT-OSS, DeepSeek-V3), products of complex numbers (DeepSeek-V2), and
rotation of the first channels only (GPT-NeoX, Phi-3). The table is recognised by its values, not its spelling.
"""

import operator

import torch
from torch import fx

from graphwright.match import Const, Match, Pattern, Var, call, either, match
from graphwright.ops import rope
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.raise_._rope_table import Table, Tables
from graphwright.program import Program
from graphwright.rewrite import Editor, RuleReport

aten = torch.ops.aten

END = 9223372036854775807


class RaiseRope(Pass):
    """Finds rotations of queries and keys."""

    name = "raise_rope"
    kind = "exact"
    paper = Paper("RoFormer: Enhanced Transformer with Rotary Position Embedding", "Su et al.", 2021, "2104.09864")
    after = ("rms_norm",)
    provides = ("rope",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces rotations whose table is proved; the others stay, with the reason."""
        tables, report = Tables(program), RuleReport()
        with Editor(program, self.name, context.fuel) as editor:
            for pattern, build, targets in FORMS:
                for node in program.calls(*targets):
                    found = match(pattern, node)
                    if isinstance(found, Match):
                        _rewrite(editor, tables, found, build, report)
        with Editor(program, self.name, context.fuel) as partial:
            for node in program.calls(aten.cat.default):
                _absorb_partial(partial, node)
        return PassResult(program, editor.sites, report.near_misses)


def _part(x: Pattern, which: int) -> Pattern:
    """The first or second half of the last dimension, sliced or split."""
    half = Const("half")
    bounds = (0, half) if which == 0 else (half, END)
    slices = [call(aten.slice.Tensor, x, dim, *bounds) for dim in (3, -1)]
    splits = [
        call(operator.getitem, call(target, x, sizes, dim), which)
        for target, sizes in (
            (aten.split.Tensor, half),
            (aten.split_with_sizes.default, [half, half]),
            (aten.chunk.default, 2),
        )
        for dim in (3, -1)
    ]
    return either(*slices, *splits)


def _strided(x: Pattern, start: int) -> Pattern:
    return either(*(call(aten.slice.Tensor, x, dim, start, END, 2) for dim in (3, -1)))


def _joined(first: Pattern, second: Pattern) -> Pattern:
    return either(*(call(aten.cat.default, [first, second], dim) for dim in (3, -1)))


_X, _COS, _SIN = Var("x"), Var("cos"), Var("sin")


def _halves_at_once() -> Pattern:
    return _X * _COS + _joined(-_part(_X, 1), _part(_X, 0)) * _SIN


def _halves_apart(first: Pattern, second: Pattern) -> Pattern:
    return _joined(first * _COS - second * _SIN, second * _COS + first * _SIN)


def _complex() -> Pattern:
    pairs = call(aten.view_as_complex.default, call(aten.reshape.default, _X, Const("_pairs")))
    turned = call(aten.view_as_real.default, pairs * _COS)
    flat = [call(aten.flatten.using_ints, turned, dim) for dim in (3, -2)]
    return either(call(aten.reshape.default, turned, Const("_shape")), *flat)


def _half(editor: Editor, found: Match, x: fx.Node, table: Table) -> fx.Node:
    return _call(editor, found.root, x, table, interleaved=False)


def _deinterleaved(editor: Editor, found: Match, x: fx.Node, table: Table) -> fx.Node:
    """Even channels, then odd ones, become halves; the result stays in halves (DeepSeek-V3)."""
    even = editor.call(aten.slice.Tensor, x, -1, 0, END, 2, before=found.root)
    odd = editor.call(aten.slice.Tensor, x, -1, 1, END, 2, before=found.root)
    halves = editor.call(aten.cat.default, [even, odd], -1, before=found.root)
    return _call(editor, found.root, halves, table, interleaved=False)


def _interleaved(editor: Editor, found: Match, x: fx.Node, table: Table) -> fx.Node:
    return _call(editor, found.root, x, table, interleaved=True)


def _call(editor: Editor, root: fx.Node, x: fx.Node, table: Table, *, interleaved: bool) -> fx.Node:
    if table.buffer:
        inv_freq = editor.read(table.buffer, before=root)
    else:
        inv_freq = editor.weight("rope_inv_freq", table.inv_freq, before=root)
    return editor.call(rope, x, table.positions, inv_freq, table.scaling, interleaved, before=root)


def _rewrite(editor: Editor, tables: Tables, found: Match, build, report: RuleReport) -> None:  # type: ignore[no-untyped-def]
    cos, sin = found["cos"], found.get("sin") or found["cos"]
    table = tables.read(cos, sin)
    reason = table if isinstance(table, str) else _unfit(found, table)
    if reason is not None or isinstance(table, str):
        report.near_misses.append(f"rope: {reason} at {found.root.name}")
        return
    if not editor.allow(found.root):
        return
    x, heads_last = found["x"], str(cos.meta["val"].shape[1]) != "1"
    if heads_last:
        x = editor.call(aten.transpose.int, x, 1, 2, before=found.root)
    new = build(editor, found, x, table)
    if heads_last:
        new = editor.call(aten.transpose.int, new, 1, 2, before=found.root)
    editor.replace(found.root, new, build.__name__.strip("_"))


def _unfit(found: Match, table: Table) -> str | None:
    x, cos = found["x"].meta["val"], found["cos"].meta["val"]
    if x.dim() != 4 or cos.dim() != 4 or "1" not in (str(cos.shape[1]), str(cos.shape[2])):
        return "x and the table are not [batch, heads, sequence, head_dim]"
    if str(found.root.meta["val"].shape) != str(x.shape):
        return "the result has another shape than x"
    rotary = 2 * table.inv_freq.shape[0]
    if str(x.shape[-1]) != str(rotary):
        return f"x has {x.shape[-1]} channels and the table turns {rotary}"
    if found.get("half") not in (None, rotary // 2):
        return f"x is cut at channel {found['half']}, not in halves"
    return "it computes in float64, and the op in float32" if x.dtype == torch.float64 else None


def _absorb_partial(editor: Editor, node: fx.Node) -> None:
    """cat([rope(x[..., :r]), x[..., r:]]) is rope(x): the op passes the channels that it does not turn."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0].target is not rope.target:
        return
    turned, passed = parts
    rotary = turned.meta["val"].shape[-1]
    if passed.target is not aten.slice.Tensor or passed.args[2] != rotary or passed.args[1] not in (3, -1):
        return
    x, head = passed.args[0], turned.args[0]
    is_head = head is x or (
        head.target is aten.slice.Tensor and head.args[0] is x and head.args[2] == 0 and head.args[3] == rotary
    )
    if is_head and editor.allow(node):
        editor.replace(node, editor.call(rope, x, *turned.args[1:], before=node), "partial")


FORMS = (
    (_halves_at_once(), _half, (aten.add.Tensor,)),
    (_halves_apart(_part(_X, 0), _part(_X, 1)), _half, (aten.cat.default,)),
    (_halves_apart(_strided(_X, 0), _strided(_X, 1)), _deinterleaved, (aten.cat.default,)),
    (_complex(), _interleaved, (aten.reshape.default, aten.flatten.using_ints)),
)
"""Pattern, builder and root ops of each spelling."""
