"""Products of fp8 activations and weights: where they are lowered, their numbers, and where they are not and why."""

import pytest
import torch
from backends.test_inductor_regions import inputs_for
from backends.test_triton_lowering import OnKernels, counts
from families.configs import build
from kernels.interpreted import runner

from graphwright.backend import coverage
from graphwright.backends.triton import BACKEND, lowering, plan
from graphwright.capture import capture
from graphwright.compiled import rewrite
from graphwright.kernels.triton import quantize
from graphwright.kernels.triton.device import DEVICES
from graphwright.numerics import relative_error
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import GPUS, Target


@pytest.fixture(scope="module")
def program() -> Program:
    model = build("llama", num_hidden_layers=1)
    return rewrite(capture(model), Recipe.load("fp8"), Target.parse("cpu"))


@pytest.mark.parametrize("target", ["cuda:sm_89", "cuda:sm_90", "rocm:gfx950"])
def test_both_sides_of_a_product_are_codes(program, target):
    lowered = lowering.lower(program, DEVICES[target])
    found = counts(lowered)
    assert found["quantize_activations"] == found["integer_linear"] == 4
    assert found["quantized_linear"] == 1, "the head has int8 weights"
    assert coverage(program, BACKEND, GPUS[target]).lowered["quantized_linear"] == 5
    inputs = inputs_for(program, 2, 5, 12)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    assert relative_error(lowered(**copies)[0], program(**inputs)[0]) < 1e-4


def test_the_kernels_compute_what_the_program_does(program):
    lowered = lowering.lower(program, OnKernels.device)
    planned = {launch.problem() for launch in plan.launches(lowered, OnKernels.device)}
    inputs = inputs_for(program, 2, 3, 9)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = program(**inputs)[0]
    machine = OnKernels(lowered, planned)
    # Sums in another order move an activation across a rounding border now and then.
    assert relative_error(machine.run(*(copies[name] for name in program.contract.names))[0], expected) < 0.1


def test_activations_are_rounded_as_the_op_rounds_them():
    torch.manual_seed(0)
    x = torch.randn(3, 40) * torch.logspace(-3, 2, 40)
    for scale, size in ((None, 0), (None, 8), (torch.tensor(0.03), 0)):
        codes, steps = quantize.quantize(runner(), x, scale, "fp8_e4m3", size)
        expected, wanted = quantize.quantize_reference(x, scale, "fp8_e4m3", size)
        assert torch.equal(codes, expected)
        assert torch.equal(steps, wanted)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("cuda:sm_80", "cuda:sm_80 multiplies no e4m3. PyTorch rounds"),
        ("rocm:gfx90a", "rocm:gfx90a multiplies no e4m3. PyTorch rounds"),
        ("rocm:gfx942", "it has another 8-bit type, e4m3fnuz"),
    ],
)
def test_other_targets_say_why_not(program, target, reason):
    found = coverage(program, BACKEND, GPUS[target])
    assert reason in found.reasons["quantize_dequantize"]
    assert "fp8_e4m3 weights have no kernel" in found.reasons["quantized_linear"]
    assert "integer_linear" not in counts(lowering.lower(program, DEVICES[target]))


def test_a_head_in_another_format_keeps_its_rounding(program):
    reasons = coverage(program, BACKEND, GPUS["cuda:sm_90"]).reasons
    assert "no product of codes reads these" in reasons["quantize_dequantize"]
