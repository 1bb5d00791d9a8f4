"""What tests of cache layouts share: rewritten programs, plain runs of them, and ragged batches."""

import functools
from typing import Any

import torch
from families.cache import captured

from graphwright.engine.generate import Generator
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


def rewritten(name: str, *passes: Any, verify: bool = False) -> Program:
    """The tiny model of a family after `passes`; a fresh copy."""
    return _rewritten(name, repr(passes), verify, passes).clone()


class _Passes:
    """Passes as a part of a cache's key: what they are is in their text."""

    def __init__(self, passes: tuple[Any, ...]) -> None:
        self.passes = passes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Passes)

    def __hash__(self) -> int:
        return 0


def _rewritten(name: str, text: str, verify: bool, passes: tuple[Any, ...]) -> Program:
    return _made(name, text, verify, _Passes(passes))


@functools.cache
def _made(name: str, text: str, verify: bool, passes: _Passes) -> Program:
    program = captured(name)[1]
    recipe = Recipe.load({"passes": list(passes.passes)})
    return PassManager(Context(CPU), verify=verify).run(program, plan_passes(recipe, program))


def greedy(program: Program, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens through the engine, over the eager graph."""
    generator = Generator(lambda tensors: program(**tensors), program.contract, program.metadata)
    return generator.generate(prompts, max_new_tokens=new_tokens, eos_token_ids=()).tokens


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 120, (length,), generator=generator).tolist() for length in lengths]
