"""activation(gate) * up in every spelling: the same numbers, golden text, and what only looks like it."""

import math

import pytest
import torch
from families.plain import run_passes
from torch import Tensor, nn
from torch.nn import functional

from graphwright.capture import capture
from graphwright.match import argument
from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import gated_activation
from graphwright.program import Program


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


FORMS = {
    "silu": ("silu", lambda g, u: functional.silu(g) * u),
    "silu, up first": ("silu", lambda g, u: u * functional.silu(g)),
    "sigmoid": ("silu", lambda g, u: g * torch.sigmoid(g) * u),
    "gelu": ("gelu", lambda g, u: functional.gelu(g) * u),
    "gelu by tanh": ("gelu_tanh", lambda g, u: functional.gelu(g, approximate="tanh") * u),
    "gelu by tanh, written out": ("gelu_tanh", lambda g, u: tanh_gelu(g) * u),
    "relu": ("relu", lambda g, u: functional.relu(g) * u),
}


class Gated(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.form = form

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.form(gate, up)


def raised(form, shape: tuple[int, ...] = (2, 3, 5), dtype: torch.dtype = torch.float32) -> tuple[Program, list[str]]:
    inputs = {name: torch.randn(shape).to(dtype) for name in ("gate", "up")}
    program, results = run_passes(capture(Gated(form), inputs, dims={}), ("raise_gated_activation",))
    return program, results["raise_gated_activation"].near_misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_forms_are_raised_with_their_numbers(name: str, dtype: torch.dtype) -> None:
    activation, form = FORMS[name]
    for shape in ((2, 3, 5), (1, 1, 96)):
        program, misses = raised(form, shape, dtype)
        (node,) = program.calls()
        assert node.target == gated_activation.target, misses
        assert argument(node, "activation") == activation
        inputs = {name: torch.randn(shape).to(dtype) for name in ("gate", "up")}
        assert relative_error(program(**inputs)[0], form(*inputs.values())) < EXACT_TOLERANCE[dtype]


def test_golden_text() -> None:
    _activation, form = FORMS["sigmoid"]
    inputs = {name: torch.randn(2, 3) for name in ("gate", "up")}
    before = capture(Gated(form), inputs, dims={})
    assert before.text(shapes=False) == (
        "%gate\n%up\n%2 = sigmoid(%gate)\n%3 = mul.Tensor(%gate, %2)\n%4 = mul.Tensor(%3, %up)\nreturn [%4]\n"
    )
    program, _misses = raised(form, (2, 3))
    assert program.text(shapes=False) == "%gate\n%up\n%2 = gated_activation(%gate, %up, silu)\nreturn [%2]\n"


@pytest.mark.parametrize(
    "form",
    [
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: functional.silu(g) + u,
        lambda g, u: g * torch.sigmoid(g) + u,
        lambda g, u: functional.silu(g) * g + u,
        lambda g, u: functional.silu(g) * u[:, :1],
        lambda g, u: functional.silu(g) * u.double(),
        lambda g, u: torch.sigmoid(u) * g,
        lambda g, u: 0.5 * g * (1.0 + torch.tanh(0.8 * (g + 0.044715 * g**3.0))) * u,
        lambda g, u: functional.silu(g) * 2.0 + u,
    ],
)
def test_what_only_looks_like_it_stays(form) -> None:
    program, _misses = raised(form)
    assert not list(program.calls(gated_activation.target))
    inputs = {name: torch.randn(2, 3, 5) for name in ("gate", "up")}
    assert torch.equal(program(**inputs)[0], form(*inputs.values()))


def test_an_activation_that_something_else_reads_stays_for_it() -> None:
    def form(gate: Tensor, up: Tensor) -> Tensor:
        active = functional.silu(gate)
        return active * up + active

    program, _misses = raised(form)
    assert len(list(program.calls(gated_activation.target))) == 1
    inputs = {name: torch.randn(2, 3, 5) for name in ("gate", "up")}
    assert relative_error(program(**inputs)[0], form(*inputs.values())) < 1e-6
