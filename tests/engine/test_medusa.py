"""Medusa heads and trees of guesses: greedy text is the program's own, training lowers the loss, trees are the likeliest."""

import itertools
import math

import pytest
import torch
from engine.test_speculative import generator, repetitive
from families.cache import captured
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright import structure
from graphwright.calibration import from_tokens
from graphwright.engine.generate import Generator
from graphwright.engine.medusa import MedusaHeads, train
from graphwright.engine.tree import Tree, best_path, likely_tree
from graphwright.errors import GenerationError, GraphwrightError
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

TREE = ["static_cache", "select_logits", "tree_verification"]


def rewritten(name: str, passes: list) -> Program:
    _, program = captured(name)
    recipe = Recipe.load({"passes": passes})
    return PassManager(Context(Target.parse("cpu"))).run(program, plan_passes(recipe, program))


def over(program: Program) -> Generator:
    return Generator(lambda tensors: program(**tensors), program.contract, program.metadata, None)


def scattered(heads: MedusaHeads, size: float) -> MedusaHeads:
    """Heads that guess all kinds of tokens, right and wrong ones."""
    noise = torch.Generator().manual_seed(0)
    return MedusaHeads(
        torch.randn(heads.residual.shape, generator=noise) * size,
        heads.out + torch.randn(heads.out.shape, generator=noise) * size,
    )


@pytest.mark.parametrize(
    ("name", "passes"),
    [("llama", TREE), ("gpt2", TREE), ("bloom", ["static_cache", "tree_verification"]),
     ("llama", [*TREE, {"rtn": {"bits": 8}}])],
)  # fmt: skip
def test_greedy_text_is_that_of_plain_decoding(name, passes):
    program = rewritten(name, passes)
    target, options = over(program), {"max_new_tokens": 18, "eos_token_ids": ()}
    heads = MedusaHeads.initial(program, 3)
    for length in (1, 9):
        prompt = repetitive(length)
        plain = target.generate(prompt, **options)
        if {"rtn": {"bits": 8}} not in passes:
            assert plain.tokens == generator(name).generate(prompt, **options).tokens
        for guessing, guesses in itertools.product((heads, scattered(heads, 0.3)), (1, 7, 40)):
            found = target.generate(prompt, **options, draft=guessing, draft_tokens=guesses)
            assert found.tokens == plain.tokens
            assert found.timing.drafted_tokens > found.timing.accepted_tokens


def test_right_guesses_are_kept_and_the_caches_follow():
    """Heads that know the text: every head puts the tokens of the plain text first, some where others would be right."""
    program = rewritten("llama", TREE)
    target, options = over(program), {"max_new_tokens": 24, "eos_token_ids": ()}
    prompt = repetitive(5)
    plain = target.generate(prompt, **options).tokens[0]

    class Knowing(MedusaHeads):
        def __call__(self, hidden):
            self.asked.append(1)
            logits = torch.randn(3, 1, 128, generator=self.noise)
            for place, token in enumerate(plain[self.taken() : self.taken() + 3]):
                logits[place, 0, token] = 4.0
            return logits

    heads = Knowing(torch.zeros(3, 64, 64), torch.zeros(1, 128, 64))
    heads.noise, heads.asked = torch.Generator().manual_seed(0), []
    pieces: list[int] = []
    heads.taken = lambda: len(pieces)
    for piece in target.stream(prompt, **options, draft=heads, draft_tokens=12):
        pieces.append(piece)  # noqa: PERF402 (the heads look at what has come so far)
    assert pieces == plain
    assert len(heads.asked) < 12


def test_heads_begin_as_the_models_own():
    program = rewritten("llama", TREE)
    hidden = torch.randn(5, 64)
    heads = MedusaHeads.initial(program, 2)
    head = structure.head(program)
    expected = hidden @ program.weight(head.args[1]).t()
    for logits in heads(hidden):
        torch.testing.assert_close(logits, expected)
    assert sum(t.numel() for t in (heads.residual, heads.out)) == 2 * (64**2 + 64 * 128)
    assert MedusaHeads.initial(program, 2, shared=True).out.shape[0] == 1


@pytest.mark.parametrize("shared", [False, True])
def test_training_teaches_what_follows_and_leaves_the_model(shared, tmp_path):
    program = rewritten("llama", TREE)
    before = {name: tensor.clone() for name, tensor in program.weights().items()}
    target = over(program)
    prompts = torch.randint(3, 128, (4, 4), generator=torch.Generator().manual_seed(0)).tolist()
    own = target.generate(prompts, max_new_tokens=28, eos_token_ids=()).tokens
    texts = torch.tensor([p + t for p, t in zip(prompts, own, strict=True)])
    heads = MedusaHeads.initial(program, 3, shared=shared)
    losses = train(program, heads, from_tokens(texts), 120, learning_rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.weights().items())
    heads.save(tmp_path / "heads.safetensors")
    loaded = MedusaHeads.load(tmp_path / "heads.safetensors")
    options = {"max_new_tokens": 28, "eos_token_ids": ()}
    found = target.generate(prompts[:1], **options, draft=loaded, draft_tokens=8)
    assert found.tokens[0] == own[0]
    assert found.timing.accepted_tokens >= 9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), depth=st.integers(1, 3), nodes=st.integers(0, 30))
def test_a_tree_holds_the_likeliest_paths(seed, depth, nodes):
    values = torch.randn(depth, 4, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    tree = likely_tree(9, values, nodes)
    paths = []
    for node in range(1, len(tree)):
        path, here = [], node
        while here:
            path.append(tree.tokens[here])
            here = tree.parents[here]
        paths.append(tuple(reversed(path)))
    every = [p for size in range(1, depth + 1) for p in itertools.product(range(4), repeat=size)]
    cost = {p: sum(float(values[level, token]) for level, token in enumerate(p)) for p in every}
    assert len(set(paths)) == len(paths) == min(nodes, len(every))
    best = sorted(cost.values(), reverse=True)[: len(paths)]
    assert sorted((cost[p] for p in paths), reverse=True) == pytest.approx(best, abs=1e-5)
    assert all(parent < node for node, parent in enumerate(tree.parents))


def test_who_sees_whom_and_what_holds():
    tree = Tree((5, 7, 8, 9, 7), (-1, 0, 0, 1, 2))
    assert tree.depths.tolist() == [0, 1, 1, 2, 2]
    seen = (tree.mask(2) == 0).long().tolist()
    assert seen == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 0, 1],
    ]
    assert best_path(tree, [8, 0, 7, 0, 3]) == ([0, 2, 4], 3)
    assert best_path(tree, [7, 7, 0, 0, 0]) == ([0, 1], 7)
    assert best_path(tree, [1, 0, 0, 0, 0]) == ([0], 1)


def test_what_is_refused(tmp_path):
    program = rewritten("llama", TREE)
    heads, target = MedusaHeads.initial(program, 2), over(program)
    with pytest.raises(GenerationError, match="need a program that verifies trees"):
        generator("llama").generate([[1, 2]], draft=heads)
    with pytest.raises(GenerationError, match="one most likely token"):
        target.generate([[1, 2]], draft=heads, temperature=0.5)
    with pytest.raises(GenerationError, match="one at a time"):
        target.generate([[1, 2], [3]], draft=heads)
    with pytest.raises(GenerationError, match="draft_tokens is 0"):
        target.generate([[1, 2]], draft=heads, draft_tokens=0)
    with pytest.raises(GraphwrightError, match="0 Medusa heads"):
        MedusaHeads.initial(program, 0)
    with pytest.raises(GraphwrightError, match="longer than they reach"):
        train(program, heads, from_tokens(torch.ones(1, 3, dtype=torch.long)), 1)
    with pytest.raises(GraphwrightError, match="holds no Medusa heads"):
        MedusaHeads.load(tmp_path / "missing.safetensors")
    assert math.isfinite(float(heads(torch.zeros(1, 64)).sum()))
