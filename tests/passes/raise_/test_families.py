"""Every family, all raising passes: how many of each op are found, and that nothing of their arithmetic is left."""

from collections import Counter

import pytest
from families.cache import captured
from families.configs import FAMILIES, build
from families.raised import OPS, RAISED
from torch import Tensor, fx

from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target
from graphwright.text import op_name, symbol_names

LEFTOVERS = {
    "cos", "sin", "polar", "view_as_complex", "view_as_real",  # rotary tables and rotations
    "rsqrt", "mean.dim", "rms_norm.default",  # norms
    "silu", "mm", "addmm", "matmul", "bmm",  # gates and products with weights
    "scaled_dot_product_attention", "repeat_interleave.self_int", "masked_fill.Tensor", "tril", "triu",
}  # fmt: skip
"""Ops of which rope, norms, gated activations, linear layers and attention are made."""


def raised(program: Program) -> Program:
    context = Context(Target.parse("cpu"))
    return PassManager(context).run(program, plan_passes(Recipe(passes=[])), consume=True)


def square(node: fx.Node, names: dict[str, str]) -> bool:
    """Whether the value has a query axis and a key axis, as a mask has."""
    value = node.meta.get("val")
    sizes = [names.get(str(size)) for size in value.shape] if isinstance(value, Tensor) else []
    return sizes.count("sequence") > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_and_leftovers(name: str) -> None:
    _model, program = captured(name)
    program = raised(program)
    found = Counter(op_name(node.target) for node in program.calls())
    assert tuple(found[op] for op in OPS) == RAISED[name]
    assert not LEFTOVERS & set(found)
    names = symbol_names(program.graph, program.contract)
    masks = [node.name for node in program.calls() if square(node, names)]
    assert not masks or name == "t5", "T5 adds a learned bias of relative positions"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5"])
def test_bfloat16_is_raised_like_float32(name: str) -> None:
    program = raised(capture(build(name).bfloat16()))
    found = Counter(op_name(node.target) for node in program.calls())
    assert tuple(found[op] for op in OPS) == RAISED[name]
