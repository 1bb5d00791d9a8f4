"""Where programs are cut into regions. Nothing is compiled."""

import pytest
import torch
from families.configs import build
from torch import nn

from graphwright.backends.inductor.lowerings import Lowered
from graphwright.backends.inductor.regions import Plan, plan_regions
from graphwright.capture import capture
from graphwright.compiled import rewrite
from graphwright.numerics import relative_error
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

LAYERS = 4


def program_of(family: str, recipe: str = "fp32", layers: int = LAYERS) -> Program:
    model = build(family, num_hidden_layers=layers)
    return rewrite(capture(model), Recipe.load(recipe), Target.parse("cpu"))


def run_plan(program: Program, plan: Plan, tensors: dict[str, torch.Tensor], form: str) -> tuple[torch.Tensor, ...]:
    """Runs a plan eagerly, one region after the other, as the executable does."""
    values: dict[str, torch.Tensor] = {}

    def read(source):
        tables = {"input": tensors, "weight": program.weights(), "value": values}
        return tables[source.kind][source.name]

    for call in plan.calls:
        results = Lowered(plan.regions[call.region].graph, form)(*map(read, call.sources))
        values.update(zip(call.outputs, results, strict=True))
    return tuple(read(source) for source in plan.outputs)


def names(plan: Plan) -> list[str]:
    return [plan.regions[call.region].name for call in plan.calls]


def inputs_for(program: Program, batch: int, sequence: int, keys: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    positions = torch.arange(keys - sequence, keys).repeat(batch, 1)
    if batch > 1:
        positions[1, -1] = -1  # padding
    state = program.contract.allocate({"batch": batch, "capacity": keys + 5})
    return {
        "input_ids": torch.randint(0, program.metadata.vocab_size, (batch, sequence)),
        "positions": positions,
        "key_positions": torch.arange(keys),
        "logit_index": torch.zeros(batch, 1, dtype=torch.int64),
        **{name: torch.randn_like(tensor) for name, tensor in state.items()},
    }


def test_equal_layers_are_one_region():
    plan = plan_regions(program_of("llama"))
    assert names(plan) == ["prologue", *["body"] * LAYERS, "epilogue"]
    body = [call for call in plan.calls if plan.regions[call.region].name == "body"]
    assert len({call.outputs for call in body}) == LAYERS
    assert all(len(call.outputs) == 1 for call in body), "only the residual stream is carried"
    first, second = (set(call.sources) for call in body[:2])
    assert not {s for s in first & second if s.kind == "input" and "cache" in s.name}, "each layer has its own caches"
    own = {s.name for s in first - second if s.kind == "weight"}
    assert own, "each layer has its own weights"
    assert not own & {s.name for s in second if s.kind == "weight"}


def test_two_layers_are_not_worth_a_region():
    assert names(plan_regions(program_of("llama", layers=2))) == ["whole"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4", "int4-sym"])
def test_plans_compute_what_programs_compute(family, recipe):
    program = program_of(family, recipe)
    plan = plan_regions(program)
    for batch, sequence, form in ((1, 1, "decode"), (1, 1, "general"), (3, 1, "general"), (2, 5, "general")):
        expected_in = inputs_for(program, batch, sequence, keys=9)
        found_in = {name: tensor.clone() for name, tensor in expected_in.items()}
        expected = program(**expected_in)
        with torch.no_grad():
            found = run_plan(program, plan, found_in, form)
        assert relative_error(found[0], expected[0]) < 2e-4, (form, batch, sequence)
        for spec in program.contract.state:
            got, want = found_in[spec.name][:, :, :-1], expected_in[spec.name][:, :, :-1]
            assert relative_error(got, want) < 2e-4, spec.name


def test_modules_without_repetition_are_one_region():
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    program = capture(module, (torch.randn(3, 16),))
    assert names(plan_regions(program)) == ["whole"]
