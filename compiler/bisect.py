"""Bisect: the first rewrite that breaks a program, by any test the user has (LLVM's opt-bisect).

    culprit = bisect(program, recipe, target, good=lambda p: kl(p, reference) < 0.1)

Every rewrite costs one unit of fuel. With none the program is as captured, with all of it as the recipe makes it; a
binary search finds the unit whose spending turns good into bad. Structural passes cost no fuel: without them the
program has another contract, so they run as soon as everything before them has run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from graphwright.compiled import CompileOptions
from graphwright.errors import GraphwrightError
from graphwright.feeding import logits_of
from graphwright.manager import PassManager, drawn, first_divergence, plan_passes
from graphwright.numerics import mean_kl
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.rewrite import Fuel
from graphwright.target import Target

Test = Callable[[Program], bool]


@dataclass(frozen=True)
class Culprit:
    """The rewrite that turns a good program into a bad one."""

    number: int
    total: int
    pass_name: str
    rewrite: str
    divergence: str
    """The first node whose value differs between the programs without and with it."""


def bisect(
    program: Program, recipe: Recipe, target: Target, good: Test, options: CompileOptions | None = None
) -> Culprit | None:
    """The first bad rewrite, or None when the whole recipe is good.

    Raises:
        GraphwrightError: the captured program is bad already, so no rewrite is to blame.
    """
    options = replace(options or CompileOptions(), verify=False)
    final, fuel = _rewritten(program, recipe, target, options, None)
    if good(final):
        return None
    if not good(program):
        raise GraphwrightError(
            "The captured program fails the test before any rewrite",
            fix="Compare the capture with the model, or loosen the test",
        )
    low, high = 0, fuel.used
    while high - low > 1:
        middle = (low + high) // 2
        options.progress(f"rewrites 1 to {middle}", 1 - (high - low) / fuel.used)
        if good(_rewritten(program, recipe, target, options, middle)[0]):
            low = middle
        else:
            high = middle
    before, _ = _rewritten(program, recipe, target, options, low)
    after, spent = _rewritten(program, recipe, target, options, high)
    name, _, place = spent.last.partition(" at ")
    return Culprit(high, fuel.used, name, place, _divergence(before, after, options.seed))


def kl_test(program: Program, limit: float, seed: int = 0) -> Test:
    """A test that a program's logits stay within `limit` nats of `program`'s, on drawn tokens."""
    ids = program.contract.draw({"batch": 2, "sequence": 16}, seed)["input_ids"]
    expected = logits_of(program, ids)
    return lambda candidate: mean_kl(logits_of(candidate, ids), expected) <= limit


def _rewritten(
    program: Program, recipe: Recipe, target: Target, options: CompileOptions, limit: int | None
) -> tuple[Program, Fuel]:
    fuel = Fuel(limit)
    context = Context(target, options.seed, fuel, list(options.calibration))
    manager = PassManager(context, verify=False, stop_when_empty=True)
    return manager.run(program, plan_passes(recipe, program)), fuel


def _divergence(before: Program, after: Program, seed: int) -> str:
    if before.contract != after.contract:
        return "the programs with and without it take different inputs"
    return first_divergence(before, after, drawn(before, {"batch": 2, "sequence": 7}, seed))
