"""Integer and grouped products in the interpreter against their references."""

import pytest
import torch
from kernels.interpreted import TOLERANCE, runner
from kernels.test_quantized_gemm import weights

from graphwright import packing
from graphwright.errors import BackendError, PassError
from graphwright.kernels.triton import codebook_gemm, embedding, grouped_gemm, integer_gemm, sparse_gemm
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Recorder, meta
from graphwright.numerics import relative_error
from graphwright.op import OPS
from graphwright.ops import grouped_linear, quantized_embedding, sparse_linear
from graphwright.sparsity import Pattern, compress


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
    args = (codes, torch.rand(5, 1), weight, torch.rand(20, 1), None, None, "fp8_e4m3", 96, torch.float32)
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
            None, None, "fp8_e4m3", 64, torch.float16,
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


@pytest.mark.parametrize("count", [1, 37, 1500])
def test_choices_are_sorted_by_expert(count):
    torch.manual_seed(0)
    choices = torch.randint(0, 5, (count,)) * 2
    order, ends = grouped_gemm.sort_by_expert(runner(count), choices, 10)
    assert torch.equal(order, choices.argsort(stable=True))
    assert torch.equal(ends.long(), torch.bincount(choices, minlength=10).cumsum(0))


@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_in_four(rows, dtype):
    torch.manual_seed(0)
    weight = torch.randn(37, 30, 4)
    weight.scatter_(-1, weight.abs().topk(2, largest=False).indices, 0.0)
    weight[0] = 0
    weight = weight.flatten(1).to(dtype)
    values, places = compress(weight)
    x, bias = torch.randn(rows, 120, dtype=dtype), torch.randn(37, dtype=dtype)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).to(dtype)
    for number in (1, 3):
        actual = sparse_gemm.linear(runner(number), x, values, places, None, None, bias, "", 0)
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize(
    ("format", "group_size", "groups"), [("int8", 120, 1), ("int8", 20, 6), ("int4", 64, 3), ("int4", 24, 5)]
)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_in_four_in_codes(rows, format, group_size, groups, zeros, dtype):
    torch.manual_seed(0)
    kind, width = packing.FORMATS[format], group_size * groups
    codes = torch.randint(kind.low, kind.high + 1, (2 * 37, width // 4))
    values = packing.pack(codes, format, group_size // 4)
    weight = torch.randn(37, width)
    places = compress(weight * Pattern(2, 4).keep(weight.abs(), 0.5))[1]
    scale = torch.rand(37, groups) * 0.1
    zero_point = torch.randint(kind.low, kind.high + 1, (37, groups)).to(values.dtype) if zeros else None
    x, bias = torch.randn(rows, width, dtype=dtype), torch.randn(37, dtype=dtype)
    arguments = (values, places, scale, zero_point, bias)
    exact = (*arguments[:-1], bias.float())
    expected = sparse_linear.reference(x.float(), *exact, "2:4", format, group_size, 37).to(dtype)
    for number in (1, 3):
        actual = sparse_gemm.linear(runner(number), x, *arguments, format, group_size)
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("books", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codebooks(rows, books, dtype):
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (37, 11, books), dtype=torch.uint8)
    table, scale, bias = torch.randn(books, 256, 8).to(dtype), torch.rand(37), torch.randn(37)
    x = torch.randn(rows, 88, dtype=dtype)
    expected = codebook_gemm.linear_reference(x, codes, table, scale, bias)
    actual = codebook_gemm.linear(runner(2), x, codes, table, scale, bias)
    assert relative_error(actual, expected) < TOLERANCE[dtype] * 2
    with pytest.raises(BackendError, match="entries of 4"):
        codebook_gemm.linear(runner(), x, codes, table[:, :, :4], scale, bias)
    with pytest.raises(BackendError, match="x has 80 columns and the weight 88"):
        codebook_gemm.linear(runner(), x[:, :80], codes, table, scale, bias)


@pytest.mark.parametrize("rows", [1, 17])
def test_outliers_are_added(rows):
    torch.manual_seed(0)
    weight = torch.where(torch.rand(29, 70) < 0.1, torch.randn(29, 70), 0.0)
    weight[3] = 0
    weight[5] = 1
    x, out = torch.randn(rows, 70), torch.randn(rows, 29)
    expected = out + x @ weight.T
    sparse = weight.to_sparse_csr()
    ends, columns = sparse.crow_indices()[1:].int(), sparse.col_indices().int()
    codebook_gemm.outliers(runner(rows), out, x, ends, columns, sparse.values())
    assert relative_error(out, expected) < 2e-5


def test_what_is_not_two_in_four_is_refused():
    with pytest.raises(PassError, match="more than two non-zeros"):
        compress(torch.ones(1, 4))
    with pytest.raises(PassError, match="groups of four"):
        compress(torch.zeros(1, 6))
    values, places = compress(torch.zeros(2, 8))
    with pytest.raises(BackendError, match="x has 4 columns and the weight 8"):
        sparse_gemm.linear(runner(), torch.zeros(1, 4), values, places, None, None, None, "", 0)
    coded = (values.char(), places, torch.ones(2, 1), None, None)
    with pytest.raises(BackendError, match="No kernel multiplies 2:4 weights in int8, groups of 6"):
        sparse_gemm.linear(runner(), torch.zeros(1, 8), *coded, "int8", 6)
    with pytest.raises(BackendError, match="No kernel multiplies 2:4 weights in nf4, groups of 8"):
        sparse_gemm.linear(runner(), torch.zeros(1, 8), *coded, "nf4", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_sample_of_quantized_embedding(dtype):
    torch.manual_seed(0)
    for number, sample in enumerate(OPS["quantized_embedding"].samples_of(dtype)):
        if sample.args[4] not in embedding.PARTS:
            with pytest.raises(BackendError, match=f"No kernel looks up {sample.args[4]} rows"):
                embedding.quantized_embedding(runner(number), *sample.args)
            continue
        actual = embedding.quantized_embedding(runner(number), *sample.args)
        assert relative_error(actual, quantized_embedding.reference(*sample.args)) < TOLERANCE[dtype]


@pytest.mark.parametrize("format", ["int3", "int2"])
def test_rows_of_a_table_of_few_bits(format):
    torch.manual_seed(0)
    weight, scale, zero = weights(format, 24, 11, 40, True)
    arguments = (torch.randint(0, 11, (2, 3)), weight, scale, zero, format, 24, 40, torch.float32)
    expected = quantized_embedding.reference(*arguments)
    assert relative_error(embedding.quantized_embedding(runner(), *arguments), expected) < 1e-6


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
