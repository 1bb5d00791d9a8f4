"""Products with packed weights in the interpreter against the op's reference, over rows, groups with tails and formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.interpreted import TOLERANCE, runner

from graphwright import packing
from graphwright.errors import BackendError
from graphwright.kernels.triton import quantized_gemm, stream_k
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Config, Recorder, Work
from graphwright.numerics import relative_error
from graphwright.op import OPS
from graphwright.ops import quantized_linear as op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_sample_of_the_op(dtype):
    torch.manual_seed(0)
    for number, sample in enumerate(OPS["quantized_linear"].samples_of(dtype)):
        if sample.args[5] not in quantized_gemm.PARTS:
            with pytest.raises(BackendError, match=f"No kernel multiplies {sample.args[5]} weights"):
                quantized_gemm.quantized_linear(runner(number), *sample.args)
            continue
        actual = quantized_gemm.quantized_linear(runner(number), *sample.args)
        assert relative_error(actual, op.reference(*sample.args)) < TOLERANCE[dtype] * 2


def weights(format, group_size, outputs, features, asymmetric):
    groups = -(-features // group_size)
    low, high = packing.FORMATS[format].low, packing.FORMATS[format].high
    codes = torch.randint(low, high + 1, (outputs, groups * group_size))
    zero = torch.randint(low, high + 1, (outputs, groups)).float() if asymmetric else None
    return packing.pack(codes, format, group_size), torch.rand(outputs, groups) * 0.1, zero


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize(
    ("format", "group_size", "features"),
    [
        ("int4", 64, 200),
        ("int4", 32, 96),
        ("int4", 200, 200),
        ("int8", 33, 99),
        ("int8", 300, 300),
        ("int3", 128, 200),
        ("int3", 40, 70),
        ("int2", 64, 150),
    ],
)
def test_rows_and_group_tails(rows, format, group_size, features):
    torch.manual_seed(0)
    for asymmetric in (False, True):
        weight, scale, zero = weights(format, group_size, 37, features, asymmetric)
        x, bias = torch.randn(rows, features), torch.randn(37)
        actual = quantized_gemm.quantized_linear(runner(4), x, weight, scale, zero, bias, format, group_size)
        expected = op.reference(x, weight, scale, zero, bias, format, group_size)
        assert relative_error(actual, expected) < 5e-5


def test_every_configuration_of_every_class():
    torch.manual_seed(0)
    weight, scale, zero = weights("int4", 32, 70, 160, True)
    for rows, count in ((1, 10), (5, 5), (40, 5), (70, 6)):
        x = torch.randn(rows, 160, dtype=torch.float16)
        expected = op.reference(x, weight, scale, zero, None, "int4", 32)
        for number in range(count):
            actual = quantized_gemm.quantized_linear(runner(number), x, weight, scale, zero, None, "int4", 32)
            assert relative_error(actual, expected) < 8e-3


def test_splitting_the_inner_dimension_gives_the_whole():
    torch.manual_seed(0)
    weight, scale, zero = weights("int4", 32, 16, 1024, True)
    x, bias = torch.randn(4, 1024), torch.randn(16)
    assert quantized_gemm.split_k(4, 16, 32, runner().device) == 8
    actual = quantized_gemm.quantized_linear(runner(), x, weight, scale, zero, bias, "int4", 32)
    assert relative_error(actual, op.reference(x, weight, scale, zero, bias, "int4", 32)) < 5e-5


def streamed(monkeypatch, count, rows, outputs, features, dtype, number=1):
    """A product of so many programs, as the op computes it in float32, and what it was computed from."""
    monkeypatch.setattr(stream_k, "programs", lambda *_: count)
    weight, scale, zero = weights("int4", 32, outputs, features, True)
    args = (torch.randn(rows, features, dtype=dtype), weight, scale, zero, torch.randn(outputs), "int4", 32)
    actual = quantized_gemm.quantized_linear(runner(number), *args)
    return actual, op.reference(args[0].float(), *args[1:]), args


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, torch.float16), (4, torch.float16), (4, torch.float32), (6, torch.float16), (10, torch.float16)],
)
def test_an_even_share_for_any_number_of_programs(monkeypatch, count, dtype):
    """Of 6 tiles of 5 steps: all by one program, cut, whole, and in two or three parts each."""
    torch.manual_seed(0)
    number, outputs = (0, 70) if dtype == torch.float32 else (5, 130)
    actual, expected, args = streamed(monkeypatch, count, 70, outputs, 160, dtype, number)
    assert relative_error(actual, expected) < TOLERANCE[dtype] * 2
    assert torch.equal(quantized_gemm.quantized_linear(runner(number), *args), actual), "equal calls, equal bits"


def test_one_tile_in_many_parts(monkeypatch):
    torch.manual_seed(0)
    actual, expected, _ = streamed(monkeypatch, 5, 65, 20, 320, torch.float16, 0)
    assert relative_error(actual, expected) < 8e-3


def test_what_a_cut_needs_is_planned_from_rows_that_are_not_cut():
    def noted(rows, device):
        recorder = Recorder(DEVICES["cuda:sm_90"])
        x, scale = torch.empty(rows, 4096, device=device, dtype=torch.float16), torch.empty(512, 32, device=device)
        weight = torch.empty(512, 2048, dtype=torch.uint8, device=device)
        quantized_gemm.quantized_linear(recorder, x, weight, scale, None, None, "int4", 128)
        return recorder.launches

    cut, whole = noted(65, "cpu"), noted(16384, "cpu")
    assert [launch.kernel for launch in cut] == [quantized_gemm.stream_gemm, stream_k.join]
    assert [launch.kernel for launch in whole] == [quantized_gemm.stream_gemm]
    assert {launch.problem() for launch in noted(16384, "meta")} == {launch.problem() for launch in cut}


@given(whole=st.integers(1, 30), steps=st.integers(1, 20), share=st.integers(1, 50))
@settings(deadline=None)
def test_the_pieces_of_cut_tiles_are_counted(whole, steps, share):
    owners = [{step // share for step in range(tile * steps, (tile + 1) * steps)} for tile in range(whole)]
    expected = sum(len(programs) for programs in owners if len(programs) > 1)
    assert stream_k.sums(whole, steps, share) <= 2 * expected
    assert stream_k.sums(whole, steps, share) >= expected


class Worked:
    """A step of a product that takes as long to multiply as a device needs, and moves nothing to speak of."""

    def work(self, config, steps):
        return Work(2 * 128 * 128 * 64 * steps, 1000 * steps, "float16")


@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90", "rocm:gfx942"])
def test_the_time_model_streams_where_tiles_leave_units_idle(name):
    device, config = DEVICES[name], Config.of(8, 3, BLOCK_M=128, BLOCK_N=128)

    def programs(tiles, steps=256):
        return stream_k.programs(128, 128 * tiles, steps, config, device, Worked())

    units = device.units
    assert programs(units) == units, "one tile for each"
    assert programs(2 * units) == 2 * units
    assert programs(60 * units + 1) == 60 * units + 1, "one more wave of sixty is not worth a cut"
    assert programs(1, steps=4) == 1, "too short to share"
    for tiles in (units // 4, units + 8, units + units // 2):
        count = programs(tiles)
        assert count != tiles
        assert count <= 2 * units
        share = -(-tiles * 256 // count)
        assert (count - 1) * share < tiles * 256 <= count * share, "no program without a share"


@pytest.mark.parametrize("format", ["nf4", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 5, 66])
def test_codes_that_index_a_table(format, rows):
    torch.manual_seed(0)
    # Groups of 32 do not divide 70 features, and tiles do not divide 19 outputs.
    weight = packing.pack(torch.randint(0, 16, (19, 96)), format, 32)
    args = (torch.randn(rows, 70), weight, torch.rand(19, 3), None, torch.randn(19), format, 32)
    for number in range(2):
        actual = quantized_gemm.quantized_linear(runner(number), *args)
        assert relative_error(actual, op.reference(*args)) < TOLERANCE[torch.float32] * 2


@pytest.mark.parametrize("format", ["int3", "int2"])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_codes_of_less_than_four_bits_with_zero_points_in_either_form(format, rows):
    torch.manual_seed(0)
    weight, scale, zero = weights(format, 64, 19, 160, True)
    x = torch.randn(rows, 160, dtype=torch.float16)
    for number, point in enumerate((None, zero.to(torch.uint8), (zero + torch.rand(19, 3)).half())):
        args = (x, weight, scale.half(), point, None, format, 64)
        exact = op.reference(x.float(), *args[1:])
        assert relative_error(quantized_gemm.quantized_linear(runner(number), *args), exact) < 4e-3


@pytest.mark.parametrize("group_size", [16, 48])
def test_every_three_bit_code_is_read_from_its_place(group_size):
    """The identity reads the weight back, all at once and some rows alone: each bit comes from where packing put it."""
    codes = torch.randint(0, 8, (5, 2 * group_size), generator=torch.Generator().manual_seed(0))
    weight, scale, eye = packing.pack(codes, "int3", group_size), torch.ones(5, 2), torch.eye(2 * group_size)
    for rows in (slice(None), *(slice(k, k + 1) for k in range(0, 2 * group_size, 9))):
        read = quantized_gemm.quantized_linear(runner(), eye[rows], weight, scale, None, None, "int3", group_size)
        assert torch.equal(read, codes.T[rows].float() - 4)


def test_refusals_say_what_there_is():
    weight, scale, zero = weights("int4", 8, 4, 16, True)
    x = torch.randn(2, 16)
    with pytest.raises(BackendError, match="groups of 8.*16 to 32768"):
        quantized_gemm.quantized_linear(runner(), x, weight, scale, zero, None, "int4", 8)
    with pytest.raises(BackendError, match="int4_offset.*int8, int4, int3, int2, nf4, mxfp4"):
        quantized_gemm.quantized_linear(runner(), x, weight, scale, None, None, "int4_offset", 16)
    with pytest.raises(BackendError, match="groups of 20.*multiples of 8"):
        quantized_gemm.quantized_linear(runner(), x, weight, scale, zero, None, "int3", 20)
    with pytest.raises(BackendError, match="8 bytes a row does not hold 2 groups of 16"):
        quantized_gemm.quantized_linear(runner(), x, weight, scale, zero, None, "int3", 16)
    with pytest.raises(BackendError, match="8 bytes a row"):
        quantized_gemm.quantized_linear(runner(), x, weight, scale, zero, None, "int4", 32)
    with pytest.raises(BackendError, match="contiguous"):
        quantized_gemm.quantized_linear(runner(), x, weight.T.contiguous().T, scale[:, :1], None, None, "int4", 16)
