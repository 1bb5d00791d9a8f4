"""Rotary embedding in every spelling: the same numbers, what the op says, golden text, and what only looks like it."""

import pytest
import torch
from families.plain import run_passes
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import rope
from graphwright.program import Program
from graphwright.text import op_name


class Rotated(nn.Module):
    """Queries x [batch, heads, sequence, head_dim], turned by a table that a subclass uses in `turn`."""

    heads_last = False

    def __init__(self, head_dim: int = 8, rotary: int | None = None, scaling: float = 1.0) -> None:
        super().__init__()
        self.rotary, self.scaling = rotary or head_dim, scaling
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, self.rotary, 2) / self.rotary))

    def angles(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1 if self.heads_last else 2])[None]
        return positions[:, :, None].to(self.inv_freq.dtype) * self.inv_freq

    def table(self, x: Tensor, *, doubled: bool = True) -> tuple[Tensor, Tensor]:
        angles = self.angles(x)
        angles = torch.cat([angles, angles], -1) if doubled else angles
        heads = 2 if self.heads_last else 1
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return cos.to(x.dtype).unsqueeze(heads), sin.to(x.dtype).unsqueeze(heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.turn(x)

    def turn(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class AtOnce(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        return x * cos + rotate_half(x) * sin


class Chunked(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1) * sin + cos * x


class Apart(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x, doubled=False)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Deinterleaved(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x, doubled=False)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


class HeadsLast(Rotated):
    heads_last = True

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        return x * cos + rotate_half(x) * sin


class Complex(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        table = torch.polar(torch.full_like(self.angles(x), self.scaling), self.angles(x))[:, None]
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3).to(x.dtype)


class ComplexReshaped(Complex):
    def turn(self, x: Tensor) -> Tensor:
        table = torch.polar(torch.full_like(self.angles(x), self.scaling), self.angles(x))[:, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).reshape(x.shape)


class Partial(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        turning, passing = x[..., : self.rotary], x[..., self.rotary :]
        return torch.cat([turning * cos + rotate_half(turning) * sin, passing], -1)


FORMS = (AtOnce, Chunked, Apart, Deinterleaved, HeadsLast, Complex, ComplexReshaped)


def raised(module: Rotated, x: Tensor) -> tuple[Program, list[str]]:
    dims = {"x": {0: "batch", 1 if module.heads_last else 2: "sequence"}}
    program = capture(module.eval(), {"x": x}, dims=dims)
    program, results = run_passes(program, ("raise_rope",))
    return program, results["raise_rope"].near_misses


def same_numbers(module: Rotated, program: Program, shapes: tuple[tuple[int, ...], ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [8, 80, 96])
def test_forms_are_raised_with_their_numbers(form: type[Rotated], head_dim: int) -> None:
    module = form(head_dim)
    shape = (2, 7, 3, head_dim) if module.heads_last else (2, 3, 7, head_dim)
    program, misses = raised(module, torch.randn(shape))
    (node,) = program.calls(rope.target)
    assert argument(node, "interleaved") == issubclass(form, Complex)
    assert not {"cos", "sin", "polar"} & {op_name(n.target) for n in program.calls()}, misses
    same_numbers(module, program, (shape, (1, 1, 3, head_dim) if module.heads_last else (1, 3, 1, head_dim)))


@pytest.mark.parametrize(("head_dim", "rotary"), [(8, 2), (80, 32), (96, 64)])
def test_the_channels_that_pass_are_part_of_the_op(head_dim: int, rotary: int) -> None:
    module = Partial(head_dim, rotary)
    program, _misses = raised(module, torch.randn(2, 3, 7, head_dim))
    (node,) = program.calls(rope.target)
    assert "cat" not in {op_name(n.target) for n in program.calls()}
    assert node.args[0].op == "placeholder"
    same_numbers(module, program, ((2, 3, 7, head_dim), (1, 3, 1, head_dim)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_temperature_is_read_before_the_table_is_rounded(dtype: torch.dtype) -> None:
    program, _misses = raised(AtOnce(scaling=1.3465735), torch.randn(2, 3, 7, 8, dtype=dtype))
    (node,) = program.calls(rope.target)
    assert argument(node, "scaling") == pytest.approx(1.3465735, rel=1e-6)


def test_golden_text() -> None:
    program = capture(Apart().eval(), {"x": torch.randn(2, 3, 7, 8)}, dims={"x": {0: "batch", 2: "sequence"}})
    assert program.text(shapes=False).endswith(
        "%18 = sub.Tensor(%16, %17)\n"
        "%19 = mul.Tensor(%15, %11)\n"
        "%20 = mul.Tensor(%14, %12)\n"
        "%21 = add.Tensor(%19, %20)\n"
        "%22 = cat([%18, %21], -1)\n"
        "return [%22]\n"
    )
    program, _misses = raised(Apart(), torch.randn(2, 3, 7, 8))
    assert program.text(shapes=False) == (
        "%x\n"
        "%1 = sym_size.int(%x, 2)\n"
        "%2 = arange(%1, device=cpu, pin_memory=False)\n"
        "%3 = unsqueeze(%2, 0)\n"
        "%4 = rope(%x, %3, inv_freq, 1.0, False)\n"
        "return [%4]\n"
    )


class OtherSign(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        half = x.shape[-1] // 2
        return x * cos + torch.cat([x[..., half:], -x[..., :half]], -1) * sin


class OtherThird(Rotated):
    """The halves are not halves."""

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin


class Squared(Rotated):
    def angles(self, x: Tensor) -> Tensor:
        return super().angles(x).square()

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        return x * cos + rotate_half(x) * sin


class FromActivations(Rotated):
    def angles(self, x: Tensor) -> Tensor:
        return super().angles(x) * x.mean()

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.table(x)
        return x * cos + rotate_half(x) * sin


class Mixed(Rotated):
    """Cosine and sine of different angles."""

    def turn(self, x: Tensor) -> Tensor:
        cos, _ = self.table(x)
        _, sin = self.table(x * 0)
        return x * cos + rotate_half(x) * (sin * 0.5)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (OtherSign, None),
        (OtherThird, "cut at channel 2"),
        (Squared, "not cos and sin of position"),
        (FromActivations, "depends on activations"),
        (Mixed, "not cos and sin of position"),
    ],
)
def test_what_only_looks_like_rope_stays(form: type[Rotated], reason: str | None) -> None:
    module, x = form(), torch.randn(2, 3, 7, 8)
    program, misses = raised(module, x)
    assert not list(program.calls(rope.target))
    assert torch.equal(program(x=x)[0], module(x).detach())
    if reason:
        assert any(reason in miss for miss in misses), misses


def test_float64_stays_because_the_op_computes_in_float32() -> None:
    module = AtOnce().double()
    program, _misses = raised(module, torch.randn(2, 3, 7, 8, dtype=torch.float64))
    assert not list(program.calls(rope.target))
