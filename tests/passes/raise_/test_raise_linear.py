"""Products with a weight in every spelling become linear, with the same numbers and one weight; others stay."""

import pytest
import torch
from families.plain import run_passes
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.numerics import relative_error
from graphwright.program import Program
from graphwright.text import op_name

aten = torch.ops.aten


class Product(nn.Module):
    """A weight [K, N], a bias [N] and `forward`, which a subclass writes."""

    def __init__(self, features: int = 6, outputs: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(features, outputs, generator=generator))
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator))


class Conv1d(Product):
    """As GPT-2 multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


class Matmul(Product):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Transposed(Product):
    """As Falcon multiplies: the weight is stored [N, K]."""

    def __init__(self) -> None:
        super().__init__(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Twice(Product):
    """One weight for two products."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight - (x + 1) @ self.weight


FORMS = (Conv1d, Matmul, Transposed, Twice)


def raised(module: nn.Module, x: Tensor) -> Program:
    program = capture(module.eval(), {"x": x}, dims={"x": {0: "batch", 1: "sequence"}} if x.dim() == 3 else {})
    return run_passes(program, ("raise_linear",))[0]


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_raised_with_their_numbers(form: type[Product]) -> None:
    module = form()
    program = raised(module, torch.randn(2, 3, 6))
    assert not {"matmul", "addmm", "mm"} & {op_name(n.target) for n in program.calls()}
    assert len(list(program.calls(aten.linear.default))) == (2 if form is Twice else 1)
    for shape in ((2, 3, 6), (1, 1, 6), (4, 9, 6)):
        x = torch.randn(shape)
        assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


def test_a_weight_used_twice_is_transposed_once() -> None:
    program = raised(Twice(), torch.randn(2, 3, 6))
    assert list(program.weights()) == ["weight_transposed"]
    assert program.weight("weight_transposed").shape == (5, 6)


def test_golden_text() -> None:
    program = capture(Conv1d().eval(), {"x": torch.randn(2, 3, 6)}, dims={"x": {0: "batch", 1: "sequence"}})
    assert program.text(shapes=False).endswith(
        "%3 = reshape(%x, [-1, 6])\n%4 = addmm(bias, %3, weight)\n%5 = reshape(%4, [%1, %2, 5])\nreturn [%5]\n"
    )
    program = raised(Conv1d(), torch.randn(2, 3, 6))
    assert program.text(shapes=False) == "%x\n%1 = linear(%x, weight_transposed, bias)\nreturn [%1]\n"


class WeightFirst(Product):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.T @ x.transpose(-1, -2)


class TwoActivations(Product):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(-1, -2) + self.bias[:1]


class Scaled(Product):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x[0], self.weight, beta=0.5)


class Experts(Product):
    """A stack of weights is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.stack


@pytest.mark.parametrize("form", [WeightFirst, TwoActivations, Scaled, Experts])
def test_what_is_no_linear_layer_stays(form: type[Product]) -> None:
    module, x = form(), torch.randn(2, 3, 6)
    program = capture(module.eval(), {"x": x}, dims={})
    program, results = run_passes(program, ("raise_linear",))
    assert not results["raise_linear"].sites
    assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5
