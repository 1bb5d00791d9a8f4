"""Mixtures of experts found in every spelling, left alone where they are not understood, and quantized."""

import pytest
import torch
from families.cache import captured
from families.configs import FAMILIES, build
from torch import nn
from torch.nn import functional
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock

from graphwright import packing
from graphwright.capture import capture
from graphwright.errors import CaptureError, PassError
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import experts, moe_routing, quantized_experts
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

MOE = [name for name, family in FAMILIES.items() if family.moe]
WIDTH, INNER, COUNT = 24, 20, 5

ROUTING = {
    "mixtral": [2, "softmax", True, 1.0, 1, 1],
    "qwen2_moe": [2, "softmax", False, 1.0, 1, 1],
    "qwen3_moe": [2, "softmax", True, 1.0, 1, 1],
    "deepseek_v2": [2, "softmax", False, 1.5, 1, 1],
    "deepseek_v3": [2, "sigmoid", True, 1.5, 4, 2],
    "gpt_oss": [2, "softmax", True, 1.0, 1, 1],
}


def run(program: Program, *passes) -> Program:
    recipe = Recipe.load({"passes": [*passes]})
    return PassManager(Context(Target.parse("cpu"))).run(program, plan_passes(recipe, program))


def near_misses(program: Program) -> list[str]:
    from graphwright.passes.moe.experts import Experts

    return Experts().run(program, Context(Target.parse("cpu"))).near_misses


def check_layers(program: Program, name: str) -> None:
    routers, layers = list(program.calls(moe_routing.target)), list(program.calls(experts.target))
    assert len(routers) == len(layers) == 2
    for router in routers:
        assert list(router.args[2:]) == ROUTING[name]
        assert (router.args[1] is not None) == (name == "deepseek_v3")
    for layer in layers:
        middle = ("clamped_swiglu", True, 1.702, 7.0) if name == "gpt_oss" else ("silu", True, 1.0, 0.0)
        assert layer.args[7:] == middle
    used = {node.target for node in program.calls()}
    assert not used & {torch.ops.aten.sort.default, torch.ops.aten.topk.default, torch.ops.aten.bmm.default}


@pytest.mark.parametrize("name", MOE)
def test_families_are_found(name: str) -> None:
    # What they say is compared with transformers in test_artifact.py, after all other steps.
    check_layers(run(captured(name)[1], "static_cache", "experts"), name)


@pytest.mark.parametrize("spelling", ["batched_mm", "eager"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_other_spellings_are_the_same_program(name: str, spelling: str) -> None:
    model = build(name)
    model.set_experts_implementation(spelling)
    before = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    program = run(capture(model), "experts")
    check_layers(program, name)
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_limited_groups_of_deepseek_v2() -> None:
    # The best 2 experts are always in the best 2 groups; the best 3 need not be.
    model = build("deepseek_v2", topk_method="group_limited_greedy", num_experts_per_tok=3)
    program = run(capture(model), "experts")
    assert [list(node.args[2:]) for node in program.calls(moe_routing.target)] == [[3, "softmax", False, 1.5, 4, 2]] * 2


@pytest.mark.parametrize("spelling", ["grouped_mm", "eager"])
def test_jambas_block(spelling: str) -> None:
    config = JambaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = spelling
    block = filled(JambaSparseMoeBlock(config))
    given = {"hidden_states": torch.randn(2, 7, WIDTH)}
    program = run(capture(block, given, dims={"hidden_states": {1: "sequence"}}), "experts")
    (router,) = program.calls(moe_routing.target)
    assert list(router.args[2:5]) == [2, "softmax", False]
    assert len(list(program.calls(experts.target))) == 1
    same(program, block, "hidden_states")


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def same(program: Program, module: nn.Module, name: str = "x") -> None:
    for length in (7, 1, 30):
        x = torch.randn(2, length, WIDTH)
        with torch.no_grad():
            assert relative_error(program(**{name: x})[0], module(x)) < 1e-4


class Mlp(nn.Module):
    def __init__(self, bias: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, INNER, bias=bias)
        self.w2 = nn.Linear(INNER, WIDTH, bias=bias)
        self.w3 = nn.Linear(WIDTH, INNER, bias=bias) if gated else None

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x) if self.w3 is not None else functional.gelu(self.w1(x)))


class Loop(nn.Module):
    """As mixtures of experts are written by hand: a list, a loop, where and index_add."""

    scoring = "softmax"

    def __init__(self, top_k: int = 2, bias: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(WIDTH, COUNT, bias=bias)
        self.experts = nn.ModuleList([Mlp(bias, gated) for _ in range(COUNT)])

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            result.index_add_(0, token, expert(rows[token]) * weights[token, place, None])
        return result.view_as(x)


class LoopOverHit(Loop):
    """The loop goes over the experts that were hit, which export cannot follow."""

    most = 1 << 30

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top_k)
        result = torch.zeros_like(rows)
        for index in chosen.unique().tolist():
            token, place = (part[: self.most] for part in torch.where(chosen == index))
            result.index_add_(0, token, self.experts[index](rows[token]) * weights[token, place, None])
        return result.view_as(x)


class DroppingOverHit(LoopOverHit):
    """An expert takes a hundred tokens at most."""

    most = 100


def captured_loop(module: nn.Module) -> Program:
    return capture(filled(module), {"x": torch.randn(2, 6, WIDTH)}, dims={"x": {1: "sequence"}})


@pytest.mark.parametrize(
    "module", [Loop(), Loop(1), Loop(2, bias=True), Loop(3, gated=False), LoopOverHit()],
    ids=["gated", "top 1", "biases", "not gated", "over hit"],
)  # fmt: skip
def test_plain_loops(module: nn.Module) -> None:
    program = run(captured_loop(module), "experts")
    assert len(list(program.calls(experts.target))) == len(list(program.calls(moe_routing.target))) == 1
    same(program, module)


class Unequal(Loop):
    """Experts of different widths, which no stack holds."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[1] = nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, WIDTH))


def test_experts_of_unequal_shape_stay_and_are_reported() -> None:
    module = Unequal()
    program = run(captured_loop(module), "experts")
    assert not list(program.calls(experts.target))
    assert "on rows that a condition chose" in program.history[-1].notes["left"][0]
    same(program, module)


def test_stacks_of_unequal_number_are_not_experts() -> None:
    module = Stacked(lambda logits: logits.softmax(-1).topk(2))
    module.down = nn.Parameter(torch.empty(COUNT + 1, WIDTH, INNER))
    program = run(captured_loop(module), "experts")
    assert not list(program.calls(experts.target))
    assert "weights go in" in program.history[-1].notes["left"][0]
    same(program, module)


def test_a_loop_that_drops_tokens_is_not_taken_for_one_that_does_not() -> None:
    with pytest.raises(CaptureError, match="DroppingOverHit cannot be captured"):
        captured_loop(DroppingOverHit())


class Stacked(nn.Module):
    """Gathered weights, with a router and an activation to choose."""

    def __init__(self, route, activation=functional.silu) -> None:
        super().__init__()
        self.route, self.activation = route, activation
        self.gate = nn.Linear(WIDTH, COUNT, bias=False)
        self.up = nn.Parameter(torch.empty(COUNT, INNER, WIDTH))
        self.down = nn.Parameter(torch.empty(COUNT, WIDTH, INNER))

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weights, chosen = self.route(self.gate(rows))
        ids = chosen.reshape(-1)
        inner = self.activation(torch.bmm(self.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1))
        outer = torch.bmm(self.down[ids], inner.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1).unsqueeze(-1)
        return outer.view(-1, 2, WIDTH).sum(1).view_as(x)


def test_a_router_that_is_not_recognised_stays_and_is_reported() -> None:
    def odd(logits):
        weights, chosen = logits.topk(2)
        return weights.tanh(), chosen

    module = Stacked(odd)
    program = run(captured_loop(module))
    assert any("the router of" in miss and "no known scoring" in miss for miss in near_misses(program.clone()))
    program = run(program, "experts")
    assert len(list(program.calls(experts.target))) == 1
    assert not list(program.calls(moe_routing.target))
    same(program, module)


def test_an_unknown_activation_is_left_alone() -> None:
    module = Stacked(lambda logits: logits.sigmoid().topk(2), lambda x: functional.softplus(x).square())
    program = run(captured_loop(module))
    assert any("none of the known ones" in miss for miss in near_misses(program))
    assert not list(program.calls(experts.target))
    same(program, module)


def test_a_second_run_changes_nothing() -> None:
    program = run(captured_loop(Stacked(lambda logits: logits.sigmoid().topk(2))), "experts")
    text = program.text()
    assert "sigmoid, False, 1.0, 1, 1" in text
    assert run(program, "experts").text() == text


# Quantization


@pytest.mark.parametrize(
    ("name", "options"),
    [("qwen2_moe", {"bits": 8, "group_size": 0, "symmetric": True}), ("gpt_oss", {"bits": 4, "group_size": 24})],
)
def test_packed_experts_equal_dequantized_ones(name: str, options: dict) -> None:
    program = run(captured(name)[1], "experts", {"rtn": {**options, "head_bits": 0, "embedding_bits": 0}})
    nodes = list(program.calls(quantized_experts.target))
    assert len(nodes) == 2
    for router in program.calls(moe_routing.target):
        assert router.args[0].target is torch.ops.aten.linear.default  # routers stay as they are
    for node in nodes:
        up, up_scale, up_zero, up_bias, down, down_scale, down_zero, down_bias = (
            None if a is None else program.weight(a) for a in node.args[3:11]
        )
        format, up_group, down_group, *rest = node.args[11:]
        x, count = torch.randn(9, 64), up.shape[0]
        indices = torch.rand(9, count).argsort(-1)[:, :2]

        def dense(codes, scale, zero, group, width, format=format):
            rows = [packing.dequantize(c, s, None if zero is None else zero[i], format, group)[:, :width]
                    for i, (c, s) in enumerate(zip(codes, scale, strict=True))]  # fmt: skip
            return torch.stack(rows)

        inner = up.shape[1] // 2
        wide, narrow = dense(up, up_scale, up_zero, up_group, 64), dense(down, down_scale, down_zero, down_group, inner)
        routed = (x, torch.ones(9, 2), indices)
        expected = experts(*routed, wide, up_bias, narrow, down_bias, *rest)
        stored = (up, up_scale, up_zero, up_bias, down, down_scale, down_zero, down_bias)
        found = quantized_experts(*routed, *stored, *node.args[11:])
        assert relative_error(found, expected) < 1e-5


def test_two_formats_in_one_layer_are_refused() -> None:
    options = {"layers": {"down_proj": {"format": "int8"}}}
    with pytest.raises(PassError, match="int4 and int8"):
        run(captured("mixtral")[1], "experts", {"rtn": options})


# Ops


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_equal_a_loop_and_do_not_read_the_others(top_k: int) -> None:
    torch.manual_seed(0)
    x, up, down = torch.randn(4, 12), torch.randn(6, 20, 12), torch.randn(6, 12, 10)
    weights, indices = torch.rand(4, top_k), torch.rand(4, 4).argsort(-1)[:, :top_k]
    up[4:], down[4:] = float("nan"), float("nan")
    expected = torch.zeros(4, 12)
    for row in range(4):
        for share, index in zip(weights[row], indices[row], strict=True):
            gate, value = (up[index] @ x[row]).chunk(2)
            expected[row] += share * (down[index] @ (functional.silu(gate) * value))
    assert relative_error(experts(x, weights, indices, up, None, down, None, "silu"), expected) < 1e-5


def test_inductors_decode_form_equals_the_reference_and_reads_chosen_experts_only() -> None:
    from graphwright.backends.inductor.experts import experts_by_reduction, quantized_experts_by_reduction

    torch.manual_seed(0)
    for op, form in ((experts, experts_by_reduction), (quantized_experts, quantized_experts_by_reduction)):
        for sample in op.samples_of(torch.float32):
            assert relative_error(form(*sample.args), op(*sample.args)) < 1e-5, sample.note


def test_bad_routing_is_refused() -> None:
    logits = torch.randn(3, 6)
    with pytest.raises(ValueError, match="top_k is 7, but there are 6"):
        moe_routing.reference(logits, None, 7)
    with pytest.raises(ValueError, match="no 4 equal groups"):
        moe_routing.reference(logits, None, 2, "softmax", False, 1.0, 4, 2)
    with pytest.raises(ValueError, match="scoring is 'relu'"):
        moe_routing.reference(logits, None, 2, "relu")
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="there are 2"):
        weights = (torch.randn(2, 8, 4), None, torch.randn(2, 4, 4), None)
        experts.reference(x, torch.ones(3, 1), torch.full((3, 1), 2), *weights, "silu")
