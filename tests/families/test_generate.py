"""Every causal family, through capture, raising and cache insertion, says what `transformers` says, token by token."""

import pytest
import torch
from families.configs import FAMILIES, VOCAB_SIZE, build

from graphwright.capture import capture
from graphwright.engine.generate import Generator
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CAUSAL = [name for name, family in FAMILIES.items() if family.causal]
NEW_TOKENS = 9


def rewritten(name: str) -> tuple[torch.nn.Module, Program]:
    model = build(name)
    program = capture(model)
    recipe = Recipe.load("fp32")
    manager = PassManager(Context(Target.parse("cpu")), recipe.budget)
    return model, manager.run(program, plan_passes(recipe, program))


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    model, program = rewritten(name)
    generator = torch.Generator().manual_seed(7)
    lengths = (11, 3, 7)  # longer than the sliding windows of the tiny configurations, and shorter
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    with torch.no_grad():
        expected = model.generate(
            input_ids=padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        )[:, padded.shape[1] :]
    engine = Generator(lambda tensors: program(**tensors), program.contract, program.metadata, None)
    found = engine.generate(prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=())
    assert found.tokens == expected.tolist()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_are_not_causal_are_refused(name: str) -> None:
    from graphwright.errors import PassError

    with pytest.raises(PassError, match=r"not (a )?causal"):
        rewritten(name)
