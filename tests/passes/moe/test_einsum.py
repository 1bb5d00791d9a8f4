"""Stacked weights that einsum multiplies whole, as plain PyTorch modules are written: dense, gathered, dispatched."""

import math

import pytest
import torch
from families.plain import context
from torch import nn
from torch.nn import functional

from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import expert_capacity, expert_choice, experts, moe_routing
from graphwright.program import Program
from graphwright.recipe import Recipe

WIDTH, INNER, COUNT = 12, 20, 5


class Stacked(nn.Module):
    """Parameters of gated experts, and a router; subclasses multiply them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, COUNT, bias=False)
        self.w1 = nn.Parameter(torch.empty(COUNT, WIDTH, INNER))
        self.w3 = nn.Parameter(torch.empty(COUNT, WIDTH, INNER))
        self.w2 = nn.Parameter(torch.empty(COUNT, INNER, WIDTH))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        self.eval()


class Dense(Stacked):
    """Every expert works on every token, and a matrix of gates with zeros sums them."""

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        values, chosen = probs.topk(2)
        gates = torch.zeros_like(probs).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        inner = functional.silu(torch.einsum("bsd,edf->bsef", x, self.w1)) * torch.einsum("bsd,edf->bsef", x, self.w3)
        return torch.einsum("bsef,efd,bse->bsd", inner, self.w2, gates)


class Gathered(Stacked):
    """The weights of the chosen experts are copied for every token."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores, chosen = self.gate(rows).sigmoid().topk(3)
        first = torch.einsum("td,tkdf->tkf", rows, self.w1[chosen])
        inner = functional.silu(first) * torch.einsum("td,tkdf->tkf", rows, self.w3[chosen])
        outer = torch.einsum("tkf,tkfd->tkd", inner, self.w2[chosen])
        return torch.einsum("tkd,tk->td", outer, scores * 1.5).view_as(x)


class Dispatched(Stacked):
    """GShard's masks: each expert has places for `capacity` tokens, or for a multiple of its equal share."""

    top_k, factor, capacity = 1, 0.0, 3

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        tokens = rows.shape[0]
        places = self.capacity or math.ceil(tokens * self.factor * self.top_k / COUNT)
        values, chosen = self.gate(rows).softmax(-1).topk(self.top_k)
        wanted = functional.one_hot(chosen, COUNT).transpose(0, 1).reshape(-1, COUNT)
        place = wanted.cumsum(0) * wanted - 1
        seats = (place.unsqueeze(-1) == torch.arange(places)).to(x.dtype).view(self.top_k, tokens, COUNT, places)
        dispatch = seats.sum(0)
        combine = (seats * values.t()[:, :, None, None]).sum(0)
        given = torch.einsum("tec,td->ecd", dispatch, rows)
        inner = functional.silu(torch.einsum("ecd,edf->ecf", given, self.w1)) * torch.bmm(given, self.w3)
        return torch.einsum("tec,ecd->td", combine, torch.bmm(inner, self.w2)).view_as(x)


class DispatchedByShare(Dispatched):
    top_k, factor, capacity = 2, 1.25, 0


class ExpertChoice(Stacked):
    """Each expert takes the tokens it likes best."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.gate(rows).softmax(-1)
        values, taken = scores.t().topk(-(-rows.shape[0] * 2 // COUNT))
        given = rows[taken]
        inner = functional.silu(torch.bmm(given, self.w1)) * torch.bmm(given, self.w3)
        outer = torch.bmm(inner, self.w2) * values.unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, taken.flatten(), outer.flatten(0, 1)).view_as(x)


class OddRouter(Dense):
    """Weights that no known routing gives."""

    def forward(self, x):
        gates = self.gate(x).softmax(-1).square()
        inner = functional.silu(torch.einsum("bsd,edf->bsef", x, self.w1)) * torch.einsum("bsd,edf->bsef", x, self.w3)
        return torch.einsum("bsef,efd,bse->bsd", inner, self.w2, gates)


class OddMlp(Dense):
    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        inner = torch.einsum("bsd,edf->bsef", x, self.w1).sin() * torch.einsum("bsd,edf->bsef", x, self.w3)
        return torch.einsum("bsef,efd,bse->bsd", inner, self.w2, gates)


def raised(module: nn.Module) -> Program:
    dims = {"x": {0: "batch", 1: "sequence"}}
    program = capture(module, {"x": torch.randn(2, 9, WIDTH)}, dims=dims)
    return PassManager(context()).run(program, plan_passes(Recipe.load({"passes": ["experts"]}), program))


def same(program: Program, module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for batch, length in ((1, 4), (2, 9), (3, 41)):
        x = torch.randn(batch, length, WIDTH, generator=generator)
        with torch.no_grad():
            assert relative_error(program(x=x)[0], module(x)) < 1e-4, (batch, length)


def only(program: Program, op):
    (found,) = program.calls(op.target)
    return found


@pytest.mark.parametrize(
    ("module", "routing"),
    [(Dense(), [2, "softmax", True, 1.0, 1, 1]), (Gathered(), [3, "sigmoid", False, 1.5, 1, 1])],
    ids=["dense", "gathered"],
)
def test_einsum_over_stacks_is_raised(module, routing):
    program = raised(module)
    assert list(only(program, moe_routing).args[2:]) == routing
    layer = only(program, experts)
    assert layer.args[7:9] == ("silu", True)
    assert layer.args[3].meta["val"].shape == (COUNT, 2 * INNER, WIDTH)
    assert not list(program.calls(torch.ops.aten.bmm.default))
    same(program, module)


@pytest.mark.parametrize(
    ("module", "limit"), [(Dispatched(), (3, 0.0)), (DispatchedByShare(), (0, 1.25))], ids=["fixed", "share"]
)
def test_dispatch_masks_become_a_capacity(module, limit):
    program = raised(module)
    assert only(program, moe_routing).args[2] == module.top_k
    assert only(program, expert_capacity).args[2:5] == (COUNT, *limit)
    assert not list(program.calls(torch.ops.aten.bmm.default))
    same(program, module)


def test_experts_that_choose():
    program = raised(ExpertChoice())
    assert only(program, expert_choice).args[1:3] == (0, 2.0)
    same(program, ExpertChoice())


def test_what_is_not_understood_stays_and_is_reported():
    for module, reason in ((OddRouter(), "no known scoring"), (OddMlp(), "none of the known MLPs")):
        program = raised(module)
        assert not list(program.calls(experts.target, moe_routing.target))
        assert any(reason in text for text in program.history[-1].notes["left"])
        same(program, module)
