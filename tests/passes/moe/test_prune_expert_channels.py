"""Removing channels inside experts: exact where they carry nothing, measured elsewhere, and run as any program is."""

import pytest
import torch
from families.cache import captured as captured_family
from families.configs import VOCAB_SIZE
from passes.moe.mixture import COUNT, INNER, Mixture, captured, only, rows, run

import graphwright
from graphwright.errors import PassError, RecipeError
from graphwright.feeding import logits_of
from graphwright.manager import PassManager, plan_passes
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import experts, quantized_experts
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target


class Dense(torch.nn.Linear):
    """A layer that is no expert."""

    def __init__(self) -> None:
        super().__init__(12, 12)

    def forward(self, x):
        return super().forward(x)


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]


def rewritten(program: Program, *passes) -> Program:
    """A copy of the program after some passes, calibrated on random tokens."""
    tokens = torch.randint(3, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(1))
    asked = Context(Target.parse("cpu"), calibration=[{"input_ids": row[None]} for row in tokens])
    return PassManager(asked).run(program.clone(), plan_passes(Recipe.load({"passes": [*passes]}), program))


def silent(fraction: float, seed: int = 0) -> tuple[Mixture, torch.Tensor]:
    """A layer in which some channels of each expert, other ones in each, carry nothing; and which they are."""
    module = Mixture()
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(COUNT, INNER, generator=generator).argsort(1)[:, : round(fraction * INNER)]
    dead = torch.zeros(COUNT, INNER, dtype=torch.bool).scatter(1, order, True)
    with torch.no_grad():
        module.down.masked_fill_(dead[:, None], 0.0)
        module.up.masked_fill_(dead.repeat(1, 2)[..., None], 0.0)
    return module, dead


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_removing_channels_that_carry_nothing_is_exact(score):
    module, dead = silent(0.5)
    program = run(captured(module), {"prune_expert_channels": {"ratio": 0.5, "score": score}})
    layer = only(program, experts)
    assert argument(layer, "up").meta["val"].shape == (COUNT, INNER, 12)
    assert argument(layer, "down").meta["val"].shape == (COUNT, 12, INNER // 2)
    down = program.weight(argument(layer, "down"))
    for expert in range(COUNT):
        assert torch.equal(down[expert], module.down[expert][:, ~dead[expert]])
    assert program.history[-1].notes["removed"] == {"up": [8, 16]}
    assert program.history[-1].error < 1e-5
    for count in (1, 33, 400):
        assert relative_error(program(x=rows(count, 9))[0], module(rows(count, 9))) < 1e-5


def test_what_carries_least_on_an_expert_s_own_tokens_goes():
    """The score in full, for one expert: squared weights times the energy on the tokens that reach it."""
    module = Mixture()
    asked = {"prune_expert_channels": {"ratio": 0.25, "multiple": 1, "min_tokens": 1}}
    program = run(captured(module), asked)
    tokens = torch.cat([rows(64, seed) for seed in (5, 6)])
    logits = torch.nn.functional.linear(tokens, module.gate, module.bias)
    chosen = logits.topk(2).indices
    down = program.weight(argument(only(program, experts), "down"))
    for expert in range(COUNT):
        gate, up = (tokens[(chosen == expert).any(1)] @ module.up[expert].T).chunk(2, -1)
        energy = (torch.nn.functional.silu(gate) * up).square().mean(0)
        worth = module.down[expert].square().sum(0) * energy
        stay = worth.argsort()[INNER // 4 :].sort().values
        assert torch.equal(down[expert], module.down[expert][:, stay])
    assert 1e-3 < program.history[-1].notes["layer_errors"]["up"] < 1


def test_weights_times_activations_cost_less_than_weights_alone():
    module = Mixture()
    with torch.no_grad():  # Large weights behind channels that hardly carry anything, where magnitudes look wrong.
        module.up[:, :4] *= 1e-3
        module.down[..., :4] *= 30
    errors = {}
    for score in ("wanda", "magnitude"):
        program = run(captured(module), {"prune_expert_channels": {"ratio": 0.25, "multiple": 4, "score": score}})
        errors[score] = relative_error(program(x=rows(200, 9))[0], module(rows(200, 9)))
    assert errors["wanda"] < 0.5 * errors["magnitude"]


def test_rare_experts_are_scored_on_tokens_of_the_layer():
    module = Mixture()
    with torch.no_grad():
        module.bias[2] = -30.0
    program = run(captured(module), {"prune_expert_channels": {"ratio": 0.5}})
    down = program.weight(argument(only(program, experts), "down"))
    assert down.shape == (COUNT, 12, INNER // 2)
    assert torch.isfinite(down).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_cut(name):
    """Half of the channels of every expert carry nothing."""
    _, program = captured_family(name)
    raised = rewritten(program, "experts")
    for node in raised.calls(experts.target):
        down = raised.weight(argument(node, "down"))
        with torch.no_grad():
            down[..., ::2] = 0
    ids = torch.randint(3, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(1))
    asked = {"ratio": 0.5, "multiple": 4}
    for score in ("wanda", "magnitude"):
        cut = rewritten(raised, {"prune_expert_channels": {**asked, "score": score}})
        assert all(2 * gone == before for gone, before in cut.history[-1].notes["removed"].values())
        if score == "wanda":
            assert relative_error(logits_of(cut, ids), logits_of(raised, ids)) < 1e-5


def test_what_is_cut_is_saved_loaded_and_lowered(tmp_path):
    _, program = captured_family("gpt_oss")
    passes = ["merge_linear", "static_cache", "select_logits", "experts"]
    cut = rewritten(program, *passes, {"prune_expert_channels": {"ratio": 0.5, "multiple": 4}})
    graphwright.compile(cut, {"passes": []}, verify=False).save(tmp_path / "out")
    loaded = graphwright.load(tmp_path / "out")
    assert loaded.backend == "tvm"
    ids = torch.randint(3, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(1))
    assert relative_error(loaded.logits(ids), logits_of(cut, ids)) < 1e-4


def test_it_comes_after_experts_and_before_quantization():
    module, _ = silent(0.5)
    cut = {"prune_expert_channels": {"ratio": 0.5}}
    rounded = {"rtn": {"bits": 8, "group_size": 0}}
    program = run(captured(module), "prune_experts", cut, rounded)
    assert argument(only(program, quantized_experts), "down").meta["val"].shape[2] == INNER // 2
    assert relative_error(program(x=rows(40, 9))[0], module(rows(40, 9))) < 0.05
    with pytest.raises(RecipeError, match="List prune_expert_channels before rtn"):
        run(captured(module), rounded, cut)
    with pytest.raises(PassError, match="would undo rtn"):
        run(program, cut)


def test_a_ratio_that_removes_nothing_names_one_that_does():
    with pytest.raises(
        PassError, match=r"removes none of 16 channels of an expert.*nearest ratio that is legal is 0.5"
    ):
        run(captured(Mixture()), {"prune_expert_channels": {"ratio": 0.2}})
    with pytest.raises(PassError, match=r"removes none of 16 channels.*lower multiple"):
        run(captured(Mixture()), {"prune_expert_channels": {"ratio": 0.9, "multiple": 16}})


def test_a_program_without_experts_is_refused():
    program = captured(Dense())
    with pytest.raises(
        PassError, match=r"No layer of experts was found.*prune_channels for layers that are no experts"
    ):
        run(program, "prune_expert_channels")
