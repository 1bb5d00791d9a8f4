"""Weights and activations in another floating-point dtype.

    before                                   after
    y = linear(x, W: float32)                y = linear(x, W: bfloat16)

Norms, softmax and rotary tables keep computing in float32 inside their ops. Rotary frequencies and ALiBi slopes stay
float32: they are positions, not weights.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import fx

from graphwright import shapes
from graphwright.contract import DTYPES
from graphwright.ops import attention, rope
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.serialize import set_attribute

aten = torch.ops.aten


class Cast(Pass):
    """Casts every floating-point weight."""

    name = "cast"
    kind = "approximate"
    paper = Paper("A Study of BFLOAT16 for Deep Learning Training", "Kalamkar et al.", 2019, "1905.12322")
    requires = ("rms_norm", "rope", "attention")
    provides = ("float_dtype",)

    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of weights and activations")

    def run(self, program: Program, context: Context) -> PassResult:
        """Casts weights, and the casts in the graph that would widen activations again."""
        dtype = DTYPES[self.dtype]
        kept = _positional(program)
        widths = {program.weight(n).dtype for n in program.graph.nodes if n.op == "get_attr" and n not in kept}
        floating = {d for d in widths if d.is_floating_point}
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.graph.nodes:
                if node.op == "get_attr" and node not in kept and node.meta["val"].is_floating_point():
                    name = str(node.target)
                    if program.weight(name).dtype != dtype and editor.allow(node):
                        set_attribute(program.module, name, program.weight(name).to(dtype))
                        editor.note(node, name)
        _cast_outputs(program, dtype, floating)
        shapes.propagate(program.module, program.contract)
        return PassResult(program, editor.sites)


def _positional(program: Program) -> set[fx.Node]:
    """Weights that encode positions: rotary frequencies and ALiBi slopes, and scalars."""
    found: set[fx.Node] = set()
    for node in program.calls(rope.target):
        found |= {n for n in (node.args[2],) if isinstance(n, fx.Node)}
    for node in program.calls(attention.target):
        found |= {n for n in (node.args[6],) if isinstance(n, fx.Node)}
    return found


def _cast_outputs(program: Program, dtype: torch.dtype, widths: set[torch.dtype]) -> None:
    """A cast to a width that the weights had is a cast to the new width."""
    for node in program.calls(aten.to.dtype):
        if node.args[1] in widths and node.args[1] != torch.float32:
            node.args = (node.args[0], dtype)
