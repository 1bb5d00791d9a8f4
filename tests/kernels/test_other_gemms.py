"""Integer and grouped products in the interpreter against their references."""

import pytest
import torch
from kernels.interpreted import TOLERANCE, runner
from kernels.test_quantized_gemm import weights

from graphwright.errors import BackendError
from graphwright.kernels.triton import grouped_gemm, integer_gemm
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Recorder, meta
from graphwright.numerics import relative_error
from graphwright.op import OPS
from graphwright.ops import grouped_linear


@pytest.mark.parametrize("rows", [1, 17, 66])
@pytest.mark.parametrize(
    ("format", "group_size", "features", "asymmetric"),
    [("int8", 100, 100, False), ("int8", 64, 150, False), ("int4", 64, 150, True), ("int4", 64, 128, False)],
)
def test_int8_activations(rows, format, group_size, features, asymmetric):
    torch.manual_seed(0)
    weight, scale, zero = weights(format, group_size, 37, features, asymmetric)
    codes, bias = torch.randint(-127, 128, (rows, features), dtype=torch.int8), torch.randn(37)
    for step in (torch.rand(rows, 1), torch.tensor(0.3)):
        args = (codes, step, weight, scale, zero, bias, format, group_size, torch.float32)
        actual = integer_gemm.linear(runner(4), *args)
        assert relative_error(actual, integer_gemm.linear_reference(*args)) < 1e-5


def test_int8_products_do_not_saturate():
    codes = torch.full((2, 4096), -127, dtype=torch.int8)
    weight = torch.full((16, 4096), -128, dtype=torch.int8)
    args = (codes, torch.ones(2, 1), weight, torch.ones(16, 1), None, None, "int8", 4096, torch.float32)
    assert (integer_gemm.linear(runner(), *args) == 127 * 128 * 4096).all()


def test_fp8_activations():
    torch.manual_seed(0)
    codes, weight = (torch.randn(n, 96).to(torch.float8_e4m3fn) for n in (5, 20))
    args = (codes, torch.rand(5, 1), weight, torch.rand(20, 1), None, None, "fp8", 96, torch.float32)
    assert relative_error(integer_gemm.linear(runner(4), *args), integer_gemm.linear_reference(*args)) < 1e-5


def test_integer_refusals():
    weight, scale, zero = weights("int8", 64, 4, 64, True)
    codes = torch.zeros(2, 64, dtype=torch.int8)
    with pytest.raises(BackendError, match="int8 weights in groups of 64 with zero points"):
        integer_gemm.linear(runner(), codes, scale, weight, scale, zero, None, "int8", 64, torch.float32)
    fp8 = meta(torch.float8_e4m3fn, 2, 64)
    with pytest.raises(BackendError, match="sm_80 has no fp8"):
        integer_gemm.linear(
            Recorder(DEVICES["cuda:sm_80"]), fp8, meta(torch.float32, 2, 1), fp8, meta(torch.float32, 2, 1),
            None, None, "fp8", 64, torch.float16,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_sample_of_grouped_linear(dtype):
    torch.manual_seed(0)
    for sample in OPS["grouped_linear"].samples_of(dtype):
        actual = grouped_gemm.grouped_linear(runner(1), *sample.args)
        assert relative_error(actual, grouped_linear.reference(*sample.args)) < TOLERANCE[dtype]


@pytest.mark.parametrize("ends", [[0, 0, 0], [70, 70, 70], [1, 40, 66], [0, 0, 90]])
def test_uneven_groups_and_rows_after_the_last(ends):
    torch.manual_seed(0)
    x, weight = torch.randn(90, 33), torch.randn(3, 33, 50)
    last = torch.tensor(ends, dtype=torch.int32)
    for number in (0, 1):
        actual = grouped_gemm.grouped_linear(runner(number), x, weight, last)
        assert relative_error(actual, grouped_linear.reference(x, weight, last)) < 2e-5


def test_rows_go_to_their_experts_and_back():
    torch.manual_seed(0)
    x, weights_of = torch.randn(7, 33), torch.rand(7, 2)
    order = torch.randperm(14)
    sent = grouped_gemm.permute(runner(), x, order // 2)
    assert torch.equal(sent, x[order // 2])
    back = order.argsort().view(7, 2)
    combined = grouped_gemm.unpermute(runner(1), sent, back, weights_of)
    assert relative_error(combined, x * weights_of.sum(1, keepdim=True)) < 1e-6


def test_too_many_experts():
    with pytest.raises(BackendError, match="1025 experts"):
        grouped_gemm.grouped_linear(
            runner(), torch.zeros(1, 1), torch.zeros(1025, 1, 1), torch.zeros(1025, dtype=torch.int32)
        )
