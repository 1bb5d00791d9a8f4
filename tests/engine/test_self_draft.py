"""A cheaper rewrite of the same model guesses: greedy text is the program's own, whatever the draft costs."""

import pytest
from engine.test_speculative import generator, repetitive
from families.cache import captured
from passes.quantize.quantizing import batches

from graphwright.engine.generate import Generator
from graphwright.errors import PassError
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target


def draft_of(name: str, recipe: str | dict) -> Generator:
    program = captured(name)[1]
    context = Context(Target.parse("cpu"), calibration=batches(2, 12))
    made = PassManager(context, verify=False).run(program, plan_passes(Recipe.load(recipe), program))
    return Generator(lambda tensors: made(**tensors), made.contract, made.metadata, None)


@pytest.mark.parametrize("recipe", ["draft-int2", "draft-pruned", "draft-skip"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_text_is_that_of_plain_decoding(name, recipe):
    target, draft = generator(name), draft_of(name, recipe)
    options = {"max_new_tokens": 20, "eos_token_ids": ()}
    for length in (1, 12):
        prompt = repetitive(length)
        plain = target.generate(prompt, **options)
        found = target.generate(prompt, **options, draft=draft, draft_tokens=3)
        assert found.tokens == plain.tokens
        assert found.timing.drafted_tokens > 0


def test_layers_are_skipped_by_their_part():
    for ratio, layers in ((0.5, 1), (0.01, 1)):
        draft = draft_of("llama", {"passes": [{"drop_layers": {"ratio": ratio}}, "static_cache"]})
        assert len(draft.contract.state) == 2 * layers
    with pytest.raises(PassError, match="1 layers are to go and the program has 1 that can"):
        one = draft_of("llama", {"passes": ["drop_layers"]})
        program = captured("llama")[1]
        context = Context(Target.parse("cpu"), calibration=batches(2, 12))
        recipe = Recipe.load({"passes": [{"drop_layers": {"ratio": 0.9}}]})
        first = PassManager(context, verify=False).run(program, plan_passes(recipe, program))
        del one
        PassManager(context, verify=False).run(first, plan_passes(recipe, first))
