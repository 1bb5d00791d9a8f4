"""Products of row groups with stacked weights: one name for all spellings, the same numbers."""

import pytest
import torch
from families.plain import run_passes
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.ops import grouped_linear
from graphwright.program import Program


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x, self.weight, offs=ends)


class Batched(Grouped):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.bmm(x[None].expand(3, -1, -1), self.weight)


def inputs(ends: tuple[int, ...]) -> dict[str, Tensor]:
    return {"x": torch.randn(ends[-1], 8).bfloat16(), "ends": torch.tensor(ends, dtype=torch.int32)}


def raised(module: Grouped) -> Program:
    program = capture(module.eval(), inputs((2, 2, 7)), dims={"x": {0: "rows"}})
    return run_passes(program, ("raise_grouped_linear",))[0]


@pytest.mark.parametrize("ends", [(2, 2, 7), (0, 0, 1), (5, 6, 9)])
def test_groups_are_raised_with_their_numbers(ends: tuple[int, ...]) -> None:
    module, given = Grouped(), inputs(ends)
    program = raised(module)
    assert program.text(shapes=False) == "%x\n%ends\n%2 = grouped_linear(%x, weight, %ends)\nreturn [%2]\n"
    torch.testing.assert_close(program(**given)[0], module(**given).detach())


def test_batches_of_products_stay() -> None:
    assert not list(raised(Batched()).calls(grouped_linear.target))
