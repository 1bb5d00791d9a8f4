"""Experts written out as products that have Triton kernels: the same numbers, and which calls are left."""

import pytest
import torch
from families.cache import captured
from families.plain import context
from torch import nn

from graphwright.backends.triton import lowering
from graphwright.backends.triton.experts import experts_as_products
from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import experts, grouped_linear
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.rewrite import Editor


class Sample(nn.Module):
    """One sample of the op, its weights stored."""

    def __init__(self, args: tuple) -> None:
        super().__init__()
        for place, value in enumerate(args[3:7]):
            self.register_buffer(f"w{place}", value)
        self.rest = args[7:]

    def forward(self, x, weights, indices):
        return experts(x, weights, indices, self.w0, self.w1, self.w2, self.w3, *self.rest)


@pytest.mark.parametrize("index", range(12))
def test_products_equal_the_op(index):
    torch.manual_seed(0)
    sample = list(experts.samples_of(torch.float32))[index]
    inputs = dict(zip(("x", "weights", "indices"), sample.args[:3], strict=True))
    module = Sample(sample.args)
    program = capture(
        module,
        inputs,
        dims={name: {0: "sequence"} for name in inputs} if len(inputs["x"]) > 1 else {n: {} for n in inputs},
    )
    with Editor(program, "triton") as editor:
        experts_as_products(program, editor)
    assert not list(program.calls(experts.target))
    assert len(list(program.calls(grouped_linear.target))) == 2
    assert relative_error(program(**inputs)[0], module(**inputs)) < 1e-5, sample.note


def counts(program: Program) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in program.calls():
        name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
        found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_families_keep_their_grouped_products(name):
    _, program = captured(name)
    program = PassManager(context(), verify=False).run(
        program, plan_passes(Recipe.load({"passes": ["experts"]}), program)
    )
    assert all(lowering.support(node).ok for node in program.calls(experts.target))
    lowered = counts(lowering.lower(program))
    assert lowered["grouped_linear"] == 4
    assert "experts" not in lowered
