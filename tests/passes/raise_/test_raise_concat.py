"""Tensors that are written part by part become one concatenation, and nothing else does."""

import pytest
import torch
from torch import nn

from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

aten = torch.ops.aten


class Filled(nn.Module):
    """Writes `parts` of x into a new tensor of width 12."""

    def __init__(self, *parts: tuple[slice, slice], new: str = "new_empty", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.parts, self.new, self.dtype = parts, new, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = getattr(x, self.new)(*x.shape[:-1], 12, dtype=self.dtype)
        for target, source in self.parts:
            result[..., target] = x[..., source]
        return result * 2


def raised(module: nn.Module) -> Program:
    program = capture(module, (torch.randn(3, 12),), dims={"x": {0: "batch"}})
    return PassManager(Context(Target.parse("cpu"))).run(program, plan_passes(Recipe(passes=[])))


HALVES = ((slice(None, 5), slice(7, None)), (slice(5, None), slice(None, 7)))


def test_halves_become_one_concatenation():
    for parts in (HALVES, HALVES[::-1]):
        program = raised(Filled(*parts))
        (cat,) = program.calls(aten.cat.default)
        assert cat.args[1] == 1
        assert not {node.target for node in program.calls()} & {aten.slice_scatter.default, aten.copy.default}
        x = torch.randn(4, 12)
        assert torch.equal(program(x=x)[0], torch.cat([x[:, 7:], x[:, :7]], 1) * 2)


def test_golden_text():
    assert raised(Filled(*HALVES)).text().splitlines() == [
        "%x : float32[batch, 12]",
        "%1 = slice.Tensor(%x, 1, 7, 9223372036854775807) : float32[batch, 5]",
        "%2 = slice.Tensor(%x, 1, 0, 7) : float32[batch, 7]",
        "%3 = cat([%1, %2], 1) : float32[batch, 12]",
        "%4 = mul.Tensor(%3, 2) : float32[batch, 12]",
        "return [%4]",
    ]


def test_three_parts_and_another_dtype():
    parts = [(slice(0, 2), slice(0, 2)), (slice(2, 9), slice(1, 8)), (slice(9, 12), slice(4, 7))]
    program = raised(Filled(*parts, dtype=torch.float64))
    (cat,) = program.calls(aten.cat.default)
    assert [node.target for node in cat.args[0]] == [aten.to.dtype] * 3
    x = torch.randn(2, 12)
    assert torch.equal(program(x=x)[0], torch.cat([x[:, :2], x[:, 1:8], x[:, 4:7]], 1).double() * 2)


@pytest.mark.parametrize(
    "module",
    [
        Filled((slice(0, 5), slice(0, 5)), new="new_zeros"),
        Filled((slice(0, 5), slice(0, 5)), (slice(4, 12), slice(0, 8)), new="new_zeros"),
        Filled((slice(0, 12, 2), slice(0, 6)), (slice(1, 12, 2), slice(6, 12)), new="new_zeros"),
    ],
    ids=["a gap", "an overlap", "steps"],
)
def test_what_is_no_concatenation_stays(module):
    program = raised(module)
    assert not list(program.calls(aten.cat.default))
    x = torch.randn(2, 12)
    assert torch.equal(program(x=x)[0], module(x))
