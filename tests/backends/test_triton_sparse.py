"""2:4 weights reach their Triton kernel; other layouts and formats are refused with the reason."""

import pytest
import torch
from backends.test_inductor_regions import inputs_for
from backends.test_triton_lowering import OnKernels
from passes.quantize.quantizing import run

from graphwright.backends.triton import BACKEND, lowering, ops, plan
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import quantized_linear, sparse_linear
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import GPUS

HALVED = ["merge_linear", {"magnitude": {"pattern": "2:4"}}, "static_cache", "select_logits"]


CODES = [[], [{"rtn": {"group_size": 32}}], [{"rtn": {"bits": 8, "group_size": 0}}]]


@pytest.mark.parametrize("codes", CODES, ids=["float32", "int4", "int8"])
def test_a_program_with_halved_weights_runs_on_the_kernel(codes):
    _, program = run([*HALVED, *codes, "compress_sparse"], calibration=[])
    lowered = lowering.lower(program)
    layers = list(lowered.calls(ops.sparse_linear.target))
    assert len(layers) == len(list(program.calls(sparse_linear.target))) > 4
    planned = {launch.problem() for launch in plan.launches(lowered, OnKernels.device)}
    for sizes in ((1, 1, 9), (2, 5, 12)):
        inputs = inputs_for(program, *sizes)
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        expected = program(**inputs)[0]
        actual = OnKernels(lowered, planned).run(*(copies[name] for name in program.contract.names))[0]
        assert relative_error(actual, expected) < 1e-3


def compressed(passes, target):
    """The program before the passes, and what `compress_sparse` makes of it for a target."""
    recipe = Recipe.load({"passes": [*passes, "compress_sparse"]})
    before, _ = run(passes[:1], calibration=[])
    return PassManager(Context(GPUS[target]), verify=False).run(before, plan_passes(recipe, before))


@pytest.mark.parametrize("codes", CODES, ids=["float32", "int4", "int8"])
@pytest.mark.parametrize("target", ["cuda:sm_90", "rocm:gfx942"])
def test_halved_weights_are_stored_for_gpus(codes, target):
    program = compressed([*HALVED, *codes], target)
    layers = list(program.calls(sparse_linear.target))
    assert len(layers) > 4
    assert all(BACKEND.supports(node, GPUS[target]).ok for node in layers)


def test_what_has_no_kernel_says_so_and_is_not_made_for_a_gpu():
    passes = [*HALVED[:1], "magnitude", *HALVED[2:]]
    _, on_cpu = run([*passes, "compress_sparse"], calibration=[])
    refusals = {BACKEND.supports(node, GPUS["cuda:sm_90"]).reason for node in on_cpu.calls(sparse_linear.target)}
    assert len(refusals) == 1
    assert "layout 1x1 have no kernel; there is one for 2:4" in refusals.pop()
    on_gpu = compressed(passes, "cuda:sm_90")
    assert not list(on_gpu.calls(sparse_linear.target))
    assert len(list(on_gpu.calls(torch.ops.aten.linear.default))) > 4


def test_what_integer_tensor_cores_multiply_stays_dense():
    rounded = [*HALVED, {"rtn": {"bits": 8, "group_size": 0}}, "activations"]
    program = compressed(rounded, "cuda:sm_90")
    assert not list(program.calls(sparse_linear.target))
    assert len(list(program.calls(quantized_linear.target))) > 4
