"""Capture: exact in all families at other sizes, plain modules, and errors that name the place."""

import pytest
import torch
from families.cache import captured
from families.configs import FAMILIES, build

from graphwright.capture import capture
from graphwright.errors import CaptureError, GraphwrightError

SIZES = [(1, 1), (3, 2), (2, 17)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_captured_exactly(name):
    model, program = captured(name)
    for batch, sequence in SIZES:
        inputs = program.contract.draw({"batch": batch, "sequence": sequence, "target_sequence": 5}, seed=1)
        with torch.no_grad():
            expected = model(**inputs)[0]
        assert torch.equal(program(**inputs)[0], expected)


def test_a_plain_module_with_several_inputs_and_outputs():
    class Plain(torch.nn.Module):
        def forward(self, x, scale, y):
            return {"sum": x + y, "product": x * scale}

    program = capture(Plain(), {"x": torch.randn(3, 4), "scale": 2.0, "y": torch.randn(3, 4)})
    assert program.contract.outputs == ("sum", "product")
    assert [spec.name for spec in program.contract.inputs] == ["x", "y"], "plain numbers are fixed"
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    total, product = program(x=x, y=y)
    assert torch.equal(total, x + y)
    assert torch.equal(product, x * 2.0)


def test_training_mode_is_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).train()
    program = capture(model, {"input": torch.randn(2, 3)})
    assert model.training
    assert "dropout" not in program.text()


def test_in_place_writes_are_made_functional():
    class Writes(torch.nn.Module):
        def forward(self, x):
            result = torch.zeros_like(x)
            result[:, 0] = x[:, 1]
            result.add_(1)
            return result

    program = capture(Writes(), {"x": torch.randn(3, 4)})
    x = torch.randn(6, 4)
    assert torch.equal(program(x=x)[0], Writes()(x))
    assert not any(n.target._schema.is_mutable for n in program.calls() if hasattr(n.target, "_schema"))


class Branches(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Loops(torch.nn.Module):
    def forward(self, x):
        total = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            total = total * 0.5 + x[:, step]
        return total


def test_data_dependent_branches_are_explained():
    with pytest.raises(CaptureError) as caught:
        capture(Branches(), {"x": torch.randn(3, 4)})
    text = str(caught.value)
    assert "if x.sum() > 0" in text
    assert "test_capture.py, line" in text
    assert "torch.where" in text


def test_loops_over_a_symbolic_size_are_explained():
    with pytest.raises(CaptureError, match="fixes a size that was asked to be symbolic|dims"):
        capture(Loops(), {"x": torch.randn(3, 4)}, dims={"x": {0: "batch", 1: "sequence"}})
    program = capture(Loops(), {"x": torch.randn(3, 4)}, dims={"x": {0: "batch"}})
    x = torch.randn(5, 4)
    assert torch.equal(program(x=x)[0], Loops()(x))


def test_nothing_to_capture():
    with pytest.raises(CaptureError, match="no example input is a tensor"):
        capture(Loops(), {})
    with pytest.raises(CaptureError, match="is not a Hugging Face model"):
        capture(Loops())


def test_weights_that_are_not_finite_are_refused():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(CaptureError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 values that are NaN"):
        capture(model)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(3, 3)
    with pytest.raises(CaptureError, match="meta device"):
        capture(model, {"input": torch.randn(2, 3)})


def test_wrong_inputs_of_a_program_are_named():
    _, program = captured("llama")
    with pytest.raises(GraphwrightError, match="takes no input called inputs_ids"):
        program(inputs_ids=torch.zeros(1, 1))
    with pytest.raises(GraphwrightError, match="input_ids is missing"):
        program(attention_mask=torch.ones(1, 1, dtype=torch.int64))
