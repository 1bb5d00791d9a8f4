"""A small mixture of experts that is raised already, for tests of rewrites."""

import torch
from families.plain import context
from torch import nn
from torch.nn import functional

from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.ops import experts, gated_activation, moe_routing
from graphwright.program import Program
from graphwright.recipe import Recipe

WIDTH, INNER, COUNT = 12, 16, 6


class Mixture(nn.Module):
    """Gated experts behind a router with a bias; of the choice too, where it has groups."""

    def __init__(self, *routing, shared: int = 0, weighed: bool = False) -> None:
        super().__init__()
        self.routing = routing or (2, "softmax", True)
        generator = torch.Generator().manual_seed(3)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.4)

        self.gate, self.bias = weights(COUNT, WIDTH), weights(COUNT)
        self.up, self.down = weights(COUNT, 2 * INNER, WIDTH), weights(COUNT, WIDTH, INNER)
        self.shared = nn.ParameterList(
            [weights(shared, WIDTH), weights(shared, WIDTH), weights(WIDTH, shared)] if shared else []
        )
        self.weigher = weights(1, WIDTH) if weighed else None

    def forward(self, x):
        weights, indices = moe_routing(functional.linear(x, self.gate, self.bias), None, *self.routing)
        result = experts(x, weights, indices, self.up, None, self.down, None, "silu")
        if len(self.shared):
            gate, up, down = self.shared
            inner = gated_activation(functional.linear(x, gate), functional.linear(x, up), "silu")
            other = functional.linear(inner, down)
            result = result + (other if self.weigher is None else functional.linear(x, self.weigher).sigmoid() * other)
        return result


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Tokens."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def captured(module: nn.Module) -> Program:
    """A program of x [tokens, WIDTH]."""
    return capture(module.eval(), {"x": rows(7)}, dims={"x": {0: "sequence"}})


def run(program: Program, *passes) -> Program:
    """The program after some passes, calibrated on tokens."""
    asked = context()
    asked.calibration = [{"x": rows(64, seed)} for seed in (5, 6)]
    return PassManager(asked).run(program, plan_passes(Recipe.load({"passes": [*passes]}), program))


def only(program: Program, op):
    """The one call of an op."""
    (found,) = program.calls(op.target)
    return found
