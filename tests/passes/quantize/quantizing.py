"""What the tests of weight quantizers share: running a recipe on a tiny family, and layers with known statistics."""

import torch
from families.cache import captured

from graphwright.calibration import Hessian, from_tokens
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


def batches(samples: int = 6, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random tokens of the tiny families."""
    generator = torch.Generator().manual_seed(seed)
    return from_tokens(torch.randint(3, 128, (samples, length), generator=generator))


def run(passes: list, name: str = "llama", program: Program | None = None, **context) -> tuple[Program, Program]:
    """The captured program, and what a recipe makes of it."""
    before = captured(name)[1] if program is None else program
    loaded = Recipe.load({"passes": passes})
    made = Context(CPU, calibration=context.pop("calibration", batches()), **context)
    return before, PassManager(made).run(before, plan_passes(loaded, before))


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Activations [rows, width] whose channels depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(2, width // 4), width, generator=generator)
    noise = torch.randn(rows, width, generator=generator)
    return torch.randn(rows, basis.shape[0], generator=generator) @ basis + 0.3 * noise


def hessian(x: torch.Tensor) -> Hessian:
    """The collector, filled with x."""
    collected = Hessian()
    collected.add(x)
    return collected
