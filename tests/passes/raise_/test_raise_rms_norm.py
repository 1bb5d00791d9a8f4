"""Root-mean-square norms as people write them: the same numbers, golden text, and what only looks like one."""

import pytest
import torch
from families.plain import run_passes
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import rms_norm
from graphwright.program import Program


class Norm(nn.Module):
    """A gain and `forward`, which a subclass writes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(0)))


class Llama(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * normed.to(x.dtype)


class Gemma(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class T5(Norm):
    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * normed.to(self.weight.dtype)


class Squared(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(1e-5 + (x * x).mean(-1, keepdim=True)) * self.weight


class NoGain(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Fused(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class FusedDefaultEps(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight)


FORMS = (Llama, Gemma, T5, Squared, NoGain, Fused, FusedDefaultEps)


def raised(module: nn.Module, x: Tensor) -> tuple[Program, list[str]]:
    program = capture(module.to(x.dtype).eval(), {"x": x}, dims={"x": {0: "batch"}} if x.dim() > 2 else {})
    program, results = run_passes(program, ("raise_rms_norm",))
    return program, results["raise_rms_norm"].near_misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_raised_with_their_numbers(form: type[Norm], dtype: torch.dtype) -> None:
    for shape in ((2, 3, 16), (2, 4, 3, 80), (2, 1, 96)):
        module, x = form(shape[-1]), torch.randn(shape).to(dtype)
        program, _misses = raised(module, x)
        assert [node.target for node in program.calls()] == [rms_norm.target]
        assert relative_error(program(x=x)[0], module(x).detach()) < EXACT_TOLERANCE[dtype]


def test_golden_text() -> None:
    program = capture(Gemma().eval(), {"x": torch.randn(2, 16)})
    assert program.text(shapes=False) == (
        "%x\n"
        "%1 = pow.Tensor_Scalar(%x, 2)\n"
        "%2 = mean.dim(%1, [-1], True)\n"
        "%3 = add.Tensor(%2, 1e-05)\n"
        "%4 = pow.Tensor_Scalar(%3, -0.5)\n"
        "%5 = mul.Tensor(%x, %4)\n"
        "%6 = add.Tensor(weight, 1.0)\n"
        "%7 = mul.Tensor(%5, %6)\n"
        "return [%7]\n"
    )
    program, _misses = raised(Gemma(), torch.randn(2, 16))
    assert program.text(shapes=False) == "%x\n%1 = rms_norm(%x, weight, 1e-05, True)\nreturn [%1]\n"


class OtherDimension(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-5)


class OtherVariance(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5))


class Cubed(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))


class SeveralDimensions(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-2:])


class Wider(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("form", [OtherDimension, OtherVariance, Cubed, SeveralDimensions, Wider])
def test_what_only_looks_like_a_norm_stays(form: type[Norm]) -> None:
    module, x = form(), torch.randn(2, 16, 16)
    program, _misses = raised(module, x)
    assert not list(program.calls(rms_norm.target))
    assert torch.equal(program(x=x)[0], module(x).detach())


@pytest.mark.parametrize("form", [Squared, Fused])
def test_float64_stays_because_the_op_computes_in_float32(form: type[Norm]) -> None:
    program, _misses = raised(form(), torch.randn(2, 3, 16, dtype=torch.float64))
    assert not list(program.calls(rms_norm.target))


def test_an_inner_value_that_something_else_reads_stays() -> None:
    class Shared(Norm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return self.weight * (x * inverse), inverse

    module, x = Shared(), torch.randn(2, 3, 16)
    program, _misses = raised(module, x)
    assert len(list(program.calls(rms_norm.target))) == 1
    for actual, expected in zip(program(x=x), module(x), strict=True):
        assert relative_error(actual, expected.detach()) < 1e-6


def test_a_near_miss_says_where_it_stopped() -> None:
    _program, misses = raised(OtherVariance(), torch.randn(2, 16))
    assert any("x is already bound to another value" in miss for miss in misses), misses
