"""Raising root-mean-square normalisation.

    before                                          after
    wide = x.float()                                y = rms_norm(x, weight, eps)
    n = wide * rsqrt(mean(wide², -1) + eps)
    y = weight * n.to(x.dtype)

Gemma's form, n * (1 + weight), is the same op with a unit offset.
"""

from collections.abc import Callable

import torch
from torch import fx

from graphwright.match import Const, Match, Pattern, Var, call, either, maybe_cast
from graphwright.ops import rms_norm
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor, Rule, apply_rules

aten = torch.ops.aten


class RaiseRmsNorm(Pass):
    """Finds root-mean-square norms with and without gain, in any floating-point dtype."""

    name = "raise_rms_norm"
    kind = "exact"
    paper = Paper("Root Mean Square Layer Normalization", "Zhang and Sennrich", 2019, "1910.07467")
    provides = ("rms_norm",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces norms with their gain first, then bare ones."""
        with Editor(program, self.name, context.fuel) as editor:
            report = apply_rules(program, GAINED, editor, {aten.mul.Tensor, aten.to.dtype, aten.rms_norm.default})
        with Editor(program, self.name, context.fuel) as bare:
            apply_rules(program, (BARE,), bare, {aten.mul.Tensor, aten.to.dtype})
        return PassResult(program, editor.sites + bare.sites, report.near_misses)


def _is_gain(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.meta["val"].dim() == 1


def _normed() -> Pattern:
    x = Var("x")
    wide = maybe_cast(x)
    variance = call(aten.mean.dim, either(wide**2, wide * wide), [-1], True) + Const("eps")
    inverse = either(call(aten.rsqrt.default, variance), call(aten.pow.Tensor_Scalar, variance, -0.5))
    return either(wide * inverse, x * inverse)  # T5 leaves the cast of the first factor to type promotion


def _check(found: Match) -> str | None:
    x, result = found["x"].meta["val"], found.root.meta["val"]
    if x.dtype == torch.float64:
        return "it computes in float64, and the op in float32"
    gain = found.get("weight")
    if gain is not None and str(gain.meta["val"].shape[0]) != str(x.shape[-1]):
        return "the gain is not as long as the normalised dimension"
    if str(x.shape) != str(result.shape):
        return "the result has another shape than x"
    return None if x.dtype == result.dtype else "the result has another dtype than x"


def _builder(unit_offset: bool) -> Callable[[Editor, Match], fx.Node]:
    def build(editor: Editor, found: Match) -> fx.Node:
        eps = found.get("eps")
        epsilon = torch.finfo(found["x"].meta["val"].dtype).eps if eps is None else float(eps)
        return editor.call(rms_norm, found["x"], found.get("weight"), epsilon, unit_offset, before=found.root)

    return build


def _check_aten(found: Match) -> str | None:
    return _check(found) if len(found["shape"]) == 1 else "it normalises over several dimensions"


_GAIN = Var("weight", _is_gain)
_ATEN = either(
    call(aten.rms_norm.default, Var("x"), Const("shape"), _GAIN, Const("eps")),
    call(aten.rms_norm.default, Var("x"), Const("shape"), _GAIN, None),
)

GAINED = (
    Rule("gain", maybe_cast(maybe_cast(_GAIN) * maybe_cast(_normed())), _builder(False), _check),
    Rule("1 + gain", maybe_cast(_normed() * (maybe_cast(_GAIN) + 1.0)), _builder(True), _check),
    Rule("aten", _ATEN, _builder(False), _check_aten),
)
BARE = Rule("no gain", maybe_cast(_normed()), _builder(False), _check)
