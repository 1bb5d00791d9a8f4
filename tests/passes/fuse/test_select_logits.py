"""Chosen logits: equal to the whole forward's, one or many, in any order."""

import pytest
import torch
from families.cache import captured

from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_chosen_logits_are_the_whole_forwards(name):
    _, program = captured(name)
    recipe = Recipe(passes=["select_logits"])
    after = PassManager(Context(CPU)).run(program, plan_passes(recipe, program))
    inputs = program.contract.draw({"batch": 2, "sequence": 6})
    everything = program(**inputs)[0]
    index = torch.tensor([[5, 0, 3], [1, 1, 0]])
    chosen = after(**inputs, logit_index=index)[0]
    expected = torch.stack([everything[b, index[b]] for b in range(2)])
    assert relative_error(chosen, expected) < 1e-5


def test_a_model_whose_output_is_no_projection_is_refused():
    class Pool(torch.nn.Module):
        def forward(self, input_ids):
            return torch.nn.functional.one_hot(input_ids, 8).float().mean(1)

    ids = torch.zeros(2, 5, dtype=torch.int64)
    program = capture(Pool(), {"input_ids": ids})
    recipe = Recipe(passes=["select_logits"])
    with pytest.raises(PassError, match="not a vocabulary projection"):
        PassManager(Context(CPU)).run(program, plan_passes(recipe, program))
