"""A newcomer's hour: write a pass, run it, see it verified, and see a wrong one caught.

python samples/write_a_pass.py
"""

import torch

import graphwright
from graphwright.errors import VerificationError
from graphwright.manager import PassManager, pass_diff
from graphwright.match import Const, Match, Var
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.rewrite import Editor, Rule, apply_rules

aten = torch.ops.aten


class MergeFactors(Pass):
    """(x * a) * b becomes x * (a · b)."""

    name = "merge_factors"
    kind = "exact"

    def run(self, program, context):
        with Editor(program, self.name, context.fuel) as editor:
            report = apply_rules(program, (RULE,), editor, {aten.mul.Tensor})
        return PassResult(program, editor.sites, report.near_misses)


def replace(editor: Editor, found: Match) -> torch.fx.Node:
    return editor.call(aten.mul.Tensor, found["x"], found["a"] * found["b"], before=found.root)


RULE = Rule("two factors", (Var("x") * Const("a")) * Const("b"), replace)


class Wrong(MergeFactors):
    """The same with a sum for a product: declared exact, and caught."""

    name = "wrong"

    def run(self, program, context):
        rule = Rule("wrong", RULE.pattern, lambda e, m: e.call(aten.mul.Tensor, m["x"], m["a"] + m["b"], before=m.root))
        with Editor(program, self.name, context.fuel) as editor:
            apply_rules(program, (rule,), editor, {aten.mul.Tensor})
        return PassResult(program, editor.sites)


class Scaled(torch.nn.Module):
    def forward(self, x):
        return (x * 2.0) * 3.0


program = graphwright.capture(Scaled(), {"x": torch.randn(4, 8)})
manager = PassManager(Context(graphwright.Target.parse("cpu")))
rewritten = manager.run(program, [MergeFactors()])
print(pass_diff(program, rewritten))
print(f"error: {rewritten.history[-1].error}")
try:
    manager.run(program, [Wrong()])
except VerificationError as caught:
    print(f"caught: {caught}")
