"""Switch: one expert per token, with a capacity, in transformers' spelling and in plain PyTorch."""

import pytest
import torch
from families.plain import context
from torch import nn
from torch.nn import functional
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

import graphwright
from graphwright.capture import capture
from graphwright.manager import PassManager, plan_passes
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import expert_capacity, experts, moe_routing
from graphwright.program import Program
from graphwright.recipe import Recipe

WIDTH, INNER, COUNT = 16, 24, 4


def config(capacity: int) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=64, d_model=WIDTH, d_ff=INNER, d_kv=8, num_heads=2, num_layers=1, num_decoder_layers=1,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=COUNT, expert_capacity=capacity,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.eval()


def raised(module: nn.Module, inputs: dict, dims: dict) -> Program:
    program = capture(module, inputs, dims=dims)
    return PassManager(context()).run(program, plan_passes(Recipe.load({"passes": ["experts"]}), program))


def block(module: nn.Module, name: str) -> Program:
    return raised(module, {name: torch.randn(2, 7, WIDTH)}, {name: {0: "batch", 1: "sequence"}})


def same(program: Program, module: nn.Module, name: str) -> None:
    for shape in ((1, 1), (2, 9), (3, 40)):
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            assert relative_error(program(**{name: x})[0], module(x)) < 1e-4


@pytest.mark.parametrize("capacity", [3, 64])
def test_transformers_block(capacity):
    module = filled(SwitchTransformersSparseMLP(config(capacity)))
    program = block(module, "hidden_states")
    (router,) = program.calls(moe_routing.target)
    (limit,) = program.calls(expert_capacity.target)
    assert [argument(router, name) for name in ("top_k", "scoring", "normalize")] == [1, "softmax", False]
    assert limit.args[2:4] == (COUNT, capacity)
    assert limit.args[0].meta["val"].dim() == 3  # each sequence is counted by itself
    (layer,) = program.calls(experts.target)
    assert layer.args[7:9] == ("relu", False)
    same(program, module, "hidden_states")


def test_the_whole_model():
    model = filled(SwitchTransformersForConditionalGeneration(config(5)))
    program = raised(model, None, None)
    assert len(list(program.calls(experts.target))) == len(list(program.calls(expert_capacity.target))) == 2
    tokens = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(2))
    mask, target = torch.ones_like(tokens), tokens[:, :5].contiguous()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
    found = program(input_ids=tokens, attention_mask=mask, decoder_input_ids=target)[0]
    assert relative_error(found, expected) < 2e-4


class Plain(nn.Module):
    """Switch as it is written by hand: a loop over a list, and places by a running sum."""

    def __init__(self, factor: float = 1.5) -> None:
        super().__init__()
        self.factor = factor
        self.router = nn.Linear(WIDTH, COUNT)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)) for _ in range(COUNT)
        )

    def places(self, tokens: int) -> int:
        return int(self.factor * tokens / COUNT)

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weight, chosen = self.router(rows).softmax(-1).max(-1)
        place = (functional.one_hot(chosen, COUNT).cumsum(0)).gather(1, chosen[:, None]).squeeze(1)
        result = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            taken = torch.where((chosen == index) & (place <= self.places(rows.shape[0])))[0]
            result[taken] = expert(rows[taken]) * weight[taken, None]
        return result.view_as(x)


class OddCapacity(Plain):
    """As many tokens as no rule says that is known."""

    def places(self, tokens: int) -> int:
        return 3 + tokens // 7


def test_plain_switch():
    module = filled(Plain())
    program = block(module, "x")
    (limit,) = program.calls(expert_capacity.target)
    assert [argument(limit, name) for name in ("capacity", "factor", "round_up")] == [0, 1.5, False]
    assert limit.args[0].meta["val"].dim() == 2
    same(program, module, "x")


def test_an_unknown_capacity_stays_and_is_reported():
    module = filled(OddCapacity())
    program = block(module, "x")
    assert not list(program.calls(experts.target))
    assert "a loop that stays as it is" in program.history[-1].notes["left"][0]
    same(program, module, "x")


def test_the_cpu_computes_the_block_and_what_is_dropped_is_reported():
    module = filled(SwitchTransformersSparseMLP(config(3)))
    example = {"hidden_states": torch.randn(2, 7, WIDTH)}
    dims = {"hidden_states": {0: "batch", 1: "sequence"}}
    given = [{"hidden_states": torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
    recipe = {"passes": ["expert_usage"]}
    compiled = graphwright.compile(module, recipe, example_inputs=example, dims=dims, calibration=given)
    assert compiled.backend == "tvm"
    notes = compiled.program.history[-1].notes
    # 40 tokens of a sequence want one expert each, and 4 experts take 3.
    (usage,), (dropped,) = notes["usage"].values(), notes["dropped"].values()
    assert max(usage) <= 2 * 3
    assert abs(dropped - (1 - sum(usage) / 80)) < 1e-9
    for shape in ((1, 1), (3, 29)):
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            assert relative_error(compiled(hidden_states=x)[0], module(x)) < 1e-5
