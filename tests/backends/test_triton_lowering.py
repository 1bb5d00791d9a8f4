"""Lowering to ops with kernels, and planning their launches. Nothing is compiled; kernels are not run."""

import functools

import pytest
import torch
from backends.test_inductor_regions import inputs_for
from families.configs import build
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.interpreted import runner
from torch import nn

from graphwright import packing
from graphwright.backends.triton import BACKEND, lowering, ops, plan
from graphwright.capture import capture
from graphwright.compiled import rewrite
from graphwright.errors import TargetError
from graphwright.kernels.triton.device import DEVICES, Device
from graphwright.kernels.triton.launch import Recorder
from graphwright.numerics import relative_error
from graphwright.ops import attention, quantize_dequantize, quantized_linear
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import GPUS, Target, local_gpu
from graphwright.text import op_name


@functools.cache
def made(family: str, recipe: str) -> Program:
    model = build(family, num_hidden_layers=2)
    return rewrite(capture(model), Recipe.load(recipe), Target.parse("cpu"))


def counts(program: Program) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in program.calls():
        found[op_name(node.target)] = found.get(op_name(node.target), 0) + 1
    return found


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "fp32"),
        ("llama", "int4"),
        ("llama", "int8-dynamic"),
        ("gemma2", "int8"),
        ("gpt_oss", "fp32"),
        ("opt", "fp32"),
    ],
)
def test_a_lowered_program_computes_the_same(family, recipe):
    program = made(family, recipe)
    lowered = lowering.lower(program)
    for sizes in ((1, 1, 9), (3, 7, 20)):
        given_inputs = inputs_for(program, *sizes)
        copies = {name: tensor.clone() for name, tensor in given_inputs.items()}
        expected, actual = program(**given_inputs), lowered(**copies)
        assert relative_error(actual[0], expected[0]) < 2e-5
        for spec in program.contract.state:
            # The last slot of a cache is scratch.
            assert relative_error(copies[spec.name][:, :, :-1], given_inputs[spec.name][:, :, :-1]) < 2e-5


class OnKernels(torch.fx.Interpreter):
    """Runs a lowered program as on a GPU: its ops launch their kernels, here in Triton's interpreter."""

    def __init__(self, program, planned):
        super().__init__(program.module)
        self.launched = 0
        self._planned = planned
        self._run = runner()

    def call_function(self, target, args, kwargs):
        if target not in ops.OPS:
            return super().call_function(target, args, kwargs)
        return ops.OPS[target].launch(self, *args, **kwargs)

    device = DEVICES["cuda:sm_90"]

    def __call__(self, launch):
        self.launched += 1
        assert launch.problem() in self._planned
        return self._run(launch)


@pytest.mark.parametrize(
    ("family", "recipe"), [("llama", "int4"), ("llama", "int8-dynamic"), ("gemma2", "fp32"), ("gpt_oss", "fp32")]
)
def test_a_program_runs_on_the_kernels_themselves(family, recipe):
    program = made(family, recipe)
    lowered = lowering.lower(program)
    planned = {launch.problem() for launch in plan.launches(lowered, OnKernels.device)}
    for sizes in ((1, 1, 9), (2, 5, 12)):
        inputs = inputs_for(program, *sizes)
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        expected = program(**inputs)[0]
        machine = OnKernels(lowered, planned)
        actual = machine.run(*(copies[name] for name in program.contract.names))[0]
        assert machine.launched >= 20
        assert relative_error(actual, expected) < TOLERANCE[recipe]
        for spec in program.contract.state:
            written = copies[spec.name][:, :, :-1]
            assert relative_error(written, inputs[spec.name][:, :, :-1]) < TOLERANCE[recipe]


TOLERANCE = {"fp32": 1e-3, "int4": 1e-3, "int8-dynamic": 5e-2}
"""Sums in another order move an activation across a rounding border now and then, where it is rounded to int8."""


def test_neighbours_are_fused():
    found = counts(lowering.lower(made("llama", "int8-dynamic")))
    assert found["rms_norm_quantize"] == 1
    assert found["add_rms_norm_quantize"] == 3
    assert found["add_rms_norm"] == 1, "the head's input is chosen first and rounded after"
    assert "add.Tensor" not in found
    assert found["rope_cache_update"] == 2
    assert found["integer_linear"] > 0
    assert "quantize_dequantize" not in found
    plain = counts(lowering.lower(made("llama", "int4")))
    assert plain["add_rms_norm"] == 4
    assert plain["rms_norm"] == 1
    assert "add.Tensor" not in plain


def test_coverage_agrees_with_what_lowering_does():
    for recipe in ("int4", "int8-dynamic"):
        program = made("llama", recipe)
        promised = {
            (n.name, n.target)
            for n in program.calls()
            if BACKEND.supports(n, GPUS["cuda:sm_90"]).ok and not (n.target.is_view or "sym_" in str(n.target))
        }
        assert len(promised) > 10
        assert not promised & {(n.name, n.target) for n in lowering.lower(program).calls()}


SIZES = {"batch": 70, "sequence": 9000, "keys": 40000, "capacity": 40000, "logits": 70}


@given(
    data=st.data(),
    recipe=st.sampled_from(["int4", "int8-dynamic"]),
    target=st.sampled_from(["cuda:sm_80", "rocm:gfx942"]),
)
@settings(max_examples=30, deadline=None)
def test_every_launch_of_any_size_was_planned(data, recipe, target):
    program, planned = planned_for(recipe, target)
    sizes = {
        dim.name: data.draw(st.integers(dim.min, min(dim.max, SIZES[dim.name])), dim.name)
        for dim in program.contract.dims
    }
    names = plan.symbol_names(program.graph, program.contract)
    for node in program.calls(*ops.OPS):
        args, kwargs = plan._arguments(node, names, sizes)
        recorder = Recorder(DEVICES[target])
        ops.OPS[node.target].launch(recorder, *args, **kwargs)
        for launch in recorder.launches:
            assert launch.problem() in planned, (sizes, launch.problem())


@functools.cache
def planned_for(recipe: str, target: str):
    program = lowering.lower(made("llama", recipe))
    return program, {launch.problem() for launch in plan.launches(program, DEVICES[target])}


def test_what_has_no_kernel_says_why():
    class Attention(nn.Module):
        def forward(self, x):
            return attention(x, x, x, None, None, None, None, None, 1.0, True)

    program = capture(Attention(), (torch.randn(2, 2, 5, 300),))
    (node,) = program.calls(attention.target)
    support = BACKEND.supports(node, GPUS["cuda:sm_90"])
    assert not support.ok
    assert "head_dim 300 has no kernel; there are kernels for 1 to 256" in support.reason
    assert counts(lowering.lower(program))["attention"] == 1


def test_group_sizes_without_a_kernel_are_left_alone():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(4, 8, dtype=torch.uint8))
            self.register_buffer("scale", torch.ones(4, 2))

        def forward(self, x):
            return quantized_linear(x, self.weight, self.scale, None, None, "int4", 8)

    program = capture(Linear(), (torch.randn(3, 16),))
    (node,) = program.calls(quantized_linear.target)
    assert "groups of 8 have no kernel" in BACKEND.supports(node, GPUS["cuda:sm_90"]).reason


@pytest.mark.parametrize("format", ["int3", "int2", "nf4", "mxfp4"])
def test_codes_of_few_bits_and_of_a_table_have_kernels(format):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            codes = torch.randint(0, 1 << packing.FORMATS[format].bits, (6, 64))
            self.register_buffer("weight", packing.pack(codes, format, 32))
            self.register_buffer("scale", torch.rand(6, 2))
            zero = torch.ones(6, 2, dtype=torch.uint8) if packing.FORMATS[format].integer else None
            self.register_buffer("zero", zero)

        def forward(self, x):
            return quantized_linear(x, self.weight, self.scale, self.zero, None, format, 32)

    x = torch.randn(3, 64)
    program = capture(Linear(), (x,))
    (node,) = program.calls(quantized_linear.target)
    assert BACKEND.supports(node, GPUS["cuda:sm_90"]).ok
    lowered = lowering.lower(program)
    planned = {launch.problem() for launch in plan.launches(lowered, OnKernels.device)}
    actual = OnKernels(lowered, planned).run(x)[0]
    assert relative_error(actual, program(**{program.contract.inputs[0].name: x})[0]) < 2e-5


def test_packed_attention_is_an_op_that_programs_may_call():
    class Packed(nn.Module):
        def forward(self, x, offsets):
            return ops.packed_attention.target(x, x, x, offsets, offsets, None, None, 0.25, True)

    inputs = (torch.randn(9, 2, 16), torch.tensor([0, 4, 9], dtype=torch.int32))
    lowered = lowering.lower(capture(Packed(), inputs, dims={"x": {0: "tokens"}, "offsets": {0: "ends"}}))
    (node,) = lowered.calls(ops.packed_attention.target)
    assert BACKEND.supports(node, GPUS["cuda:sm_90"]).ok
    planned = {launch.problem() for launch in plan.launches(lowered, OnKernels.device)}
    assert relative_error(OnKernels(lowered, planned).run(*inputs)[0], Packed()(*inputs)) < 2e-5


def test_a_measured_scale_reaches_the_integer_product():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randint(-127, 128, (6, 64), dtype=torch.int8))
            self.register_buffer("weight_scale", torch.rand(6, 1))
            self.register_buffer("scale", torch.tensor(0.03))

        def forward(self, x):
            rounded = quantize_dequantize(x, self.scale, "int8", 0)
            return quantized_linear(rounded, self.weight, self.weight_scale, None, None, "int8", 64)

    x = torch.randn(3, 64)
    program = capture(Linear(), (x,))
    lowered = lowering.lower(program)
    assert counts(lowered)["integer_linear"] == 1
    name = program.contract.inputs[0].name
    assert relative_error(lowered(**{name: x})[0], program(**{name: x})[0]) < 1e-5
    assert plan.launches(lowered, DEVICES["cuda:sm_90"])


def test_a_device_is_one_of_the_table():
    with pytest.raises(TargetError, match="no Triton kernels for the target cpu"):
        Device.of(Target.parse("cpu"))
    assert set(DEVICES) == {target.name for target in GPUS.values() if target.kind in ("cuda", "rocm")}


@pytest.mark.skipif(local_gpu() is not None, reason="says what is missing without a GPU")
def test_torch_compile_explains_that_there_is_no_gpu():
    options = {"backend": "triton", "target": "cuda:sm_90", "verify": False}
    compiled = torch.compile(nn.Linear(4, 4), backend="graphwright", options=options)
    with pytest.raises(TargetError, match="needs a GPU.*ahead of time"):
        compiled(torch.randn(2, 4))
    torch._dynamo.reset()


@pytest.mark.skipif(local_gpu() is not None, reason="says what is missing without a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, "compiles for cuda, rocm, and this machine has no such GPU"),
        ({"backend": "triton", "target": "cpu"}, "compiles for cuda, rocm, and cpu is cpu"),
    ],
)
def test_torch_compile_refuses_a_backend_for_another_target(options, message):
    compiled = torch.compile(nn.Linear(4, 4), backend="graphwright", options=options)
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(2, 4))
    torch._dynamo.reset()
