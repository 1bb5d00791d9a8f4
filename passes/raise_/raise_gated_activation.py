"""Raising the middle of a gated MLP.

before                       after
a = silu(gate)               h = gated_activation(gate, up, "silu")
h = a * up
"""

import torch
from torch import fx

from graphwright.match import Match, NoMatch, Pattern, Var, call, either, match
from graphwright.ops import gated_activation
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor, Rule, apply_rules

aten = torch.ops.aten


class RaiseGatedActivation(Pass):
    """Finds activation(gate) * up for SiLU, GELU in both forms, and ReLU."""

    name = "raise_gated_activation"
    kind = "exact"
    paper = Paper("GLU Variants Improve Transformer", "Shazeer", 2020, "2002.05202")
    provides = ("gated_activation",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces the product; the activation goes with it unless something else reads it."""
        with Editor(program, self.name, context.fuel) as editor:
            report = apply_rules(program, RULES, editor, {aten.mul.Tensor})
        return PassResult(program, editor.sites, report.near_misses)


def _gelu_tanh(x: Pattern) -> Pattern:
    """GELU by tanh as it is spelled out: 0.5 x (1 + tanh(0.79788 (x + 0.044715 x³)))."""
    inner = (x + (x**3.0) * 0.044715) * 0.7978845608028654
    return (x * 0.5) * (call(aten.tanh.default, inner) + 1.0)


def _activations(x: Pattern) -> dict[str, Pattern]:
    return {
        "silu": either(call(aten.silu.default, x), x * call(aten.sigmoid.default, x)),
        "gelu": call(aten.gelu.default, x),
        "gelu_tanh": either(call(aten.gelu.default, x, approximate="tanh"), _gelu_tanh(x)),
        "relu": call(aten.relu.default, x),
    }


def _check(found: Match) -> str | None:
    gate, up = found["gate"], found["up"]
    one, other = gate.meta["val"], up.meta["val"]
    if one.dtype != other.dtype or str(one.shape) != str(other.shape):
        return "gate and up differ in shape or dtype"
    if not isinstance(match(call(aten.sigmoid.default, Var("x")), up), NoMatch):
        return "it is a SiLU written as x * sigmoid(x)"
    return None if gate is not up else "gate and up are the same"


def _rule(name: str, activation: Pattern) -> Rule:
    def replace(editor: Editor, found: Match) -> fx.Node:
        return editor.call(gated_activation, found["gate"], found["up"], name, before=found.root)

    return Rule(name, activation * Var("up"), replace, _check)


RULES = tuple(_rule(name, activation) for name, activation in _activations(Var("gate")).items())
