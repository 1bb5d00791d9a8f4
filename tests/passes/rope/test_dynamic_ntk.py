"""Dynamic NTK against transformers' own: whole texts, generation past the trained context, and other texts' lengths."""

import copy
import math

import pytest
import torch
from families.cache import captured
from families.configs import VOCAB_SIZE, build

from graphwright.engine.generate import Generator
from graphwright.errors import PassError, RecipeError
from graphwright.manager import PassManager, plan_passes
from graphwright.ops import rope
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target


def run(program: Program, *passes) -> Program:
    recipe = Recipe.load({"passes": [*passes]})
    return PassManager(Context(Target.parse("cpu"))).run(program, plan_passes(recipe, program))


def twin(name: str, factor: float) -> torch.nn.Module:
    """The same weights in a model whose own configuration scales its rotary embedding."""
    model = build(name)
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": factor}
    made = type(model)(config).eval()
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    return made


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(program: Program, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return program(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask)[0]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("factor", "alpha"), [(3, 1.0), (2, None)])
def test_whole_texts_are_transformers_own(name, factor, alpha):
    _, program = captured(name)
    trained = program.metadata.context_length
    scaled = run(program, {"dynamic_ntk": {"factor": factor, "alpha": alpha}})
    assert scaled.metadata.context_length == scaled.contract.dim("sequence").max == factor * trained
    model = twin(name, float(alpha or factor))
    for length in (5, trained, trained + 1, factor * trained):
        ids = tokens(length, batch=1)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        assert float((logits(scaled, ids) - expected).norm() / expected.norm()) < 1e-4


def test_texts_within_the_trained_context_are_read_as_before():
    _, program = captured("llama")
    ids = tokens(program.metadata.context_length)
    torch.testing.assert_close(
        logits(run(program, {"dynamic_ntk": {"factor": 4}}), ids), logits(run(program), ids), rtol=1e-5, atol=1e-5
    )


def test_the_longest_text_of_a_batch_decides():
    _, program = captured("llama")
    scaled, length = run(program, {"dynamic_ntk": {"factor": 2}}), program.metadata.context_length + 9
    ids, mask = tokens(length), torch.ones(2, length, dtype=torch.long)
    both = logits(scaled, ids, mask)
    torch.testing.assert_close(logits(scaled, ids[:1])[0], both[0], rtol=1e-4, atol=1e-4)
    # All ropes that share positions share one computation.
    assert len({node.args[2] for node in scaled.calls(rope.target)}) == 1


def test_generation_with_a_cache_is_transformers_generation():
    model = build("llama")
    trained = model.config.max_position_embeddings
    program = run(captured("llama")[1], {"dynamic_ntk": {"factor": 2}}, "static_cache", "select_logits")
    prompt = tokens(trained - 4, batch=1)
    generator = Generator(lambda tensors: program(**tensors), program.contract, program.metadata)
    found = generator.generate(prompt.tolist(), max_new_tokens=12, eos_token_ids=()).tokens
    with torch.no_grad():
        expected = twin("llama", 2.0).generate(input_ids=prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    assert found == expected[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("option", ["factor", "alpha"])
@pytest.mark.parametrize("value", [0.5, 0, -2, math.nan, math.inf])
def test_factors_below_one_are_refused(option, value):
    with pytest.raises(RecipeError, match=option):
        Recipe.load({"passes": [{"dynamic_ntk": {"factor": 2, option: value}}]})


def test_what_is_refused():
    with pytest.raises(PassError, match="and the program has none"):
        run(captured("gpt2")[1], {"dynamic_ntk": {"factor": 2}})
    with pytest.raises(PassError, match="comes before caches"):
        run(run(captured("llama")[1], "static_cache"), {"dynamic_ntk": {"factor": 2}})
    with pytest.raises(RecipeError, match="excludes scaled_rope"):
        run(captured("llama")[1], {"dynamic_ntk": {"factor": 2}}, {"yarn": {"factor": 2}})
