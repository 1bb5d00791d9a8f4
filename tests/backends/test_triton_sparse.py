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


def test_a_program_with_halved_weights_runs_on_the_kernel():
    _, program = run([*HALVED, "compress_sparse"], calibration=[])
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


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ([*HALVED, {"rtn": {"group_size": 32}}], "2:4 weights in int4 have no kernel"),
        ([*HALVED[:1], "magnitude", *HALVED[2:]], "layout 1x1 have no kernel; there is one for 2:4"),
    ],
)
def test_what_has_no_kernel_says_so_and_is_not_made_for_a_gpu(passes, reason):
    before, on_cpu = run([*passes, "compress_sparse"], calibration=[])
    refusals = {BACKEND.supports(node, GPUS["cuda:sm_90"]).reason for node in on_cpu.calls(sparse_linear.target)}
    assert len(refusals) == 1
    assert reason in refusals.pop()
    plan_ = plan_passes(Recipe.load({"passes": [*passes, "compress_sparse"]}), before)
    on_gpu = PassManager(Context(GPUS["cuda:sm_90"]), verify=False).run(before, plan_)
    assert not list(on_gpu.calls(sparse_linear.target))
    layers = [torch.ops.aten.linear.default, quantized_linear.target]
    assert len(list(on_gpu.calls(*layers))) > 4
