"""Norms, gates, rounding and rope in the interpreter against their references, over odd shapes and every configuration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.interpreted import TOLERANCE, runner
from torch.nn import functional

from graphwright import packing
from graphwright.errors import BackendError
from graphwright.kernels.triton import activation, norm, quantize, rope
from graphwright.numerics import relative_error
from graphwright.op import OPS
from graphwright.ops import gated_activation, kv_cache_update, quantize_dequantize, rms_norm
from graphwright.ops import rope as rope_op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = {"rms_norm": norm.rms_norm, "gated_activation": activation.gated_activation, "rope": rope.rope}


def close(actual, expected):
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) < TOLERANCE[expected.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_sample_of_the_op(name, dtype):
    torch.manual_seed(0)
    for number, sample in enumerate(OPS[name].samples_of(dtype)):
        actual = KERNELS[name](runner(number), *sample.args, **sample.kwargs)
        close(actual, OPS[name].reference(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("width", [1, 17, 80, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_with_residual_and_rounding(width, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, width, dtype=dtype), torch.randn(2, 5, width, dtype=dtype)
    weight, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    for number in range(len(norm.configs(width))):
        run = runner(number)
        total, out = norm.add_rms_norm(run, x, residual, weight, 1e-6)
        # The interpreter cuts float32 off to bfloat16 where a GPU rounds, so the sums differ by a last bit.
        close(total, x + residual)
        close(out, rms_norm.reference(total, weight, 1e-6))
        if width > 1:
            total, out = norm.add_layer_norm(run, x, residual, weight, bias, 1e-5)
            close(out, functional.layer_norm(total.float(), (width,), weight.float(), bias.float()).to(dtype))
        total, codes, scale = norm.add_rms_norm_quantize(run, x, residual, weight, 1e-6)
        close(total, x + residual)
        expected, step = norm.rms_norm_quantize_reference(total, weight, 1e-6)
        assert (codes.int() - expected.int()).abs().max() <= (2 if dtype == torch.bfloat16 else 1)
        codes, scale = norm.rms_norm_quantize(run, x, weight, 1e-6)
        expected, step = norm.rms_norm_quantize_reference(x, weight, 1e-6)
        # The norm may differ in its last bit and the scale with it, and then a code by one, of bfloat16 by two.
        assert (codes.int() - expected.int()).abs().max() <= (2 if dtype == torch.bfloat16 else 1)
        assert relative_error(scale, step) < TOLERANCE[dtype]


def test_norm_of_a_strided_view():
    merged = torch.randn(6, 96)
    close(norm.rms_norm(runner(), merged[:, 32:64], None, 1e-6), rms_norm.reference(merged[:, 32:64], None, 1e-6))


def test_norm_names_its_limit():
    with pytest.raises(BackendError, match="32769.*32768"):
        norm.rms_norm(runner(), torch.zeros(1, 32769), None, 1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gate_from_halves_of_one_tensor(name):
    torch.manual_seed(0)
    gate, up = torch.randn(3, 5, 130, dtype=torch.float16).split(65, dim=-1)
    for number in range(4):
        close(activation.gated_activation(runner(number), gate, up, name), gated_activation.reference(gate, up, name))
    codes, scale = activation.gated_activation_quantize(runner(), gate, up, name)
    expected, step = activation.gated_activation_quantize_reference(gate, up, name)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert relative_error(scale, step) < 4e-3


def test_gate_refuses_what_it_does_not_have():
    with pytest.raises(BackendError, match="gelu_tanh"):
        activation.gated_activation(runner(), torch.zeros(1, 4), torch.zeros(1, 4), "gelu_tan")
    with pytest.raises(BackendError, match="agree"):
        activation.gated_activation(runner(), torch.zeros(1, 4), torch.zeros(2, 4), "silu")


@given(
    rows=st.integers(1, 7), groups=st.integers(1, 3), group_size=st.sampled_from([1, 3, 32]), seed=st.integers(0, 99)
)
@settings(max_examples=15, deadline=None)
def test_codes_are_those_of_the_reference(rows, groups, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * group_size, generator=generator)
    x[0] = 0
    for size in (0, group_size):
        codes, scale = quantize.quantize(runner(), x, None, "int8", size)
        expected, step = quantize.quantize_reference(x, None, "int8", size)
        assert torch.equal(codes, expected)
        assert torch.equal(scale, step)
        product = (codes.float().unflatten(-1, (-1, size or x.shape[-1])) * scale[..., None]).flatten(-2)
        assert torch.equal(product, quantize_dequantize.reference(x, None, "int8", size))


def test_static_scale_and_ties():
    x, scale = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 400.0]]), torch.tensor(1.0)
    codes, same = quantize.quantize(runner(), x, scale, "int8", 0)
    assert codes.tolist() == [[0, 2, 2, 0, -2, 127]]
    assert same is scale


def test_quantize_refuses_unknown_formats_and_groups():
    with pytest.raises(BackendError, match="int3"):
        quantize.quantize(runner(), torch.zeros(1, 4), None, "int3", 0)
    with pytest.raises(BackendError, match="do not divide"):
        quantize.quantize(runner(), torch.zeros(1, 4), None, "int8", 3)


@pytest.mark.parametrize("group_size", [2, 32, 96])
def test_packing_equals_the_layout(group_size):
    torch.manual_seed(0)
    weight = torch.randn(7, 96, dtype=torch.float16)
    weight[0] = 0
    packed, scale, zero = quantize.pack_int4(runner(), weight, group_size)
    expected = quantize.pack_int4_reference(weight, group_size)
    for actual, wanted in zip((packed, scale, zero), expected, strict=True):
        assert torch.equal(actual, wanted)
    dense = packing.dequantize(packed, scale, zero, "int4", group_size)
    assert (dense - weight.float()).abs().max() <= scale.max() * 0.51


def test_packing_refuses_odd_groups():
    with pytest.raises(BackendError, match="even"):
        quantize.pack_int4(runner(), torch.zeros(2, 9), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_writes(dtype):
    torch.manual_seed(0)
    for sample in OPS["kv_cache_update"].samples_of(dtype):
        cache, new, slots = sample.args
        expected, actual = cache.clone(), cache.clone()
        kv_cache_update.reference(expected, new, slots)
        rope.kv_cache_update(runner(1), actual, new, slots)
        assert torch.equal(actual[:, :, :-1], expected[:, :, :-1])
        positions = torch.randint(0, 500, slots.shape)
        inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        kv_cache_update.reference(expected, rope_op.reference(new, positions, inv_freq), slots)
        rope.rope_cache_update(runner(2), actual, new, slots, positions, inv_freq)
        close(actual[:, :, :-1], expected[:, :, :-1])


def test_rope_of_transposed_heads():
    x = torch.randn(2, 9, 3, 24).transpose(1, 2)
    positions, inv_freq = torch.randint(0, 2000, (2, 9)), torch.rand(12)
    for number in range(4):
        close(rope.rope(runner(number), x, positions, inv_freq), rope_op.reference(x, positions, inv_freq))


def test_angles_of_long_contexts():
    """Position 1 with the angle as frequency turns the unit vector (1, 0) to (cosine, sine)."""
    torch.manual_seed(0)
    angles = torch.cat([torch.rand(500) * 131072, torch.arange(-40, 40) * torch.pi / 4, torch.rand(64) * 1e-3])
    x = torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])[None, None, None]
    turned = rope.rope(runner(), x, torch.ones(1, 1, dtype=torch.int64), angles)[0, 0, 0]
    expected = torch.cat([angles.double().cos(), angles.double().sin()])
    assert (turned - expected).abs().max() < 3e-7


def test_rope_refuses_more_channels_than_there_are():
    with pytest.raises(BackendError, match="turns 10 channels"):
        rope.rope(runner(), torch.zeros(1, 1, 1, 8), torch.zeros(1, 1), torch.zeros(5))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(BackendError, match="weight on meta"):
        norm.rms_norm(runner(), torch.zeros(1, 8), torch.zeros(8, device="meta"), 1e-6)
