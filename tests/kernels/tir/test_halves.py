"""Linear kernels over weights that keep two in four: tiles, and products of every instruction set at hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.tir.running import HOST, code_rows, nowhere, run, size

from graphwright import packing
from graphwright.kernels.tir import tiles
from graphwright.kernels.tir.float_linear import matrix as float_matrix
from graphwright.kernels.tir.float_linear import vector as float_vector
from graphwright.kernels.tir.isa import ISAS, Isa
from graphwright.kernels.tir.linear import Linear
from graphwright.kernels.tir.quantized_linear import code_row, matrix, vector
from graphwright.numerics import relative_error
from graphwright.ops import quantize_dequantize, sparse_linear
from graphwright.sparsity import Pattern, compress

HERE = [isa for isa in ISAS if isa.needs <= set(HOST.features)]

FLOATS = [
    # N, K, format, group, asymmetric, bias, residual, activation
    (48, 64, "", 0, False, False, False, ""),
    (37, 84, "", 0, False, True, True, ""),
    (96, 4, "", 0, False, True, False, "silu"),
    (48, 128, "int4", 64, True, False, True, ""),
    (33, 96, "int8", 96, False, True, False, ""),
    (96, 64, "int4", 32, False, True, False, "silu"),
]

CODES = [
    # … and activations that share a step
    (48, 64, "int4", 32, True, False, False, "", 0),
    (40, 128, "int4", 64, False, True, True, "", 0),
    (33, 96, "int8", 96, False, True, False, "", 0),
    (64, 64, "int8", 32, True, False, True, "", 0),
    (96, 128, "int4", 64, True, True, False, "silu", 32),
    (33, 96, "int8", 96, True, False, False, "", 32),
]


def halved(outputs: int, width: int, format: str, group: int, asymmetric: bool) -> tuple:
    """Values, places, scale and zero point of a random 2:4 weight; one group of four is all zeros."""
    dense = torch.randn(outputs, width) * Pattern(2, 4).keep(torch.rand(outputs, width), 0.5)
    dense[0, :4] = 0
    values, places = compress(dense)
    if not format:
        return values, places, None, None
    kind, groups = packing.FORMATS[format], width // group
    codes = torch.randint(kind.low, kind.high + 1, (2 * outputs, width // 4))
    zero = torch.randint(kind.low, kind.high + 1, (outputs, groups)).to(kind.storage) if asymmetric else None
    return packing.pack(codes, format, group // 4), places, torch.rand(outputs, groups).half() * 0.1 + 0.01, zero


def check(rows: int, case: tuple, isa: Isa) -> float:
    """Relative error of a kernel against the op; with codes, on the same codes."""
    outputs, width, format, group, asymmetric, with_bias, with_residual, activation, *shared = case
    values, places, scale, zero = halved(outputs, width, format, group, asymmetric)
    x, bias = torch.randn(1, rows, width), torch.randn(outputs) if with_bias else None
    read = quantize_dequantize(x, None, "int8", shared[0]) if shared else x
    expected = sparse_linear(read, values, places, scale, zero, bias, "2:4", format, group, outputs)
    scale_dtype, code_group = "float16" if format else "", shared[0] if shared else 0
    options = (asymmetric, scale_dtype, with_bias, with_residual, activation, code_group)
    layer = Linear(outputs, width, format or "float32", group or width, *options, halved=True)
    arguments = [tiles.tile_halves(values, format, group), tiles.tile_places(places, width // 4)]
    arguments += [] if scale is None else [tiles.tile_groups(scale)]
    arguments += [] if zero is None else [tiles.tile_zero_points(zero, format)]
    arguments += [] if bias is None else [bias]
    if activation:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    if with_residual:
        arguments.append(torch.randn_like(expected))
        expected = expected + arguments[-1]
    out = nowhere(1, rows, layer.width)
    lead = (1, 1) if rows == 1 else (size("batch"), size("sequence"))
    if shared:
        built = vector(layer, isa, lead) if rows == 1 else matrix(layer, isa, lead)
        run(built, code_rows(x, code_row(layer)), *arguments, out)
    else:
        one = float_vector(layer, isa.lanes, lead, isa.pick_floats) if rows == 1 else None
        run(one or float_matrix(layer, isa.lanes, lead), x, *arguments, out)
    return relative_error(out, expected)


@pytest.mark.parametrize("case", [*FLOATS, *CODES], ids=str)
def test_kernels_equal_the_reference(case):
    torch.manual_seed(0)
    for rows in (1, 12):
        assert check(rows, case, HERE[0]) < 2e-6


def test_blocks_of_many_rows_equal_the_reference():
    torch.manual_seed(0)
    for case in (CODES[0], CODES[3], CODES[4]):
        assert check(40, case, HERE[0]) < 2e-6


@pytest.mark.parametrize("isa", HERE[1:], ids=lambda isa: isa.name)
def test_other_instruction_sets_equal_the_reference(isa):
    torch.manual_seed(0)
    for rows, case in ((1, FLOATS[1]), (1, CODES[4]), (3, CODES[3]), (9, CODES[5])):
        assert check(rows, case, isa) < 2e-6


@given(rows=st.integers(1, 40), groups=st.integers(1, 24), format=st.sampled_from(["", "int4", "int8"]))
@settings(deadline=None, max_examples=40)
def test_tiles_are_undone_bit_for_bit(rows, groups, format):
    width = 4 * groups if not format else 32 * groups
    values, places, *_ = halved(rows, width, format, 32 if format else 0, asymmetric=False)
    tiled = tiles.tile_halves(values, format, 32)
    assert torch.equal(tiles.untile_halves(tiled, format, 32, rows), values)
    assert torch.equal(tiles.untile_places(tiles.tile_places(places, width // 4), width // 4, rows), places)


def test_what_is_stored_is_half_and_a_bit_per_weight():
    for format, bits in (("", 17), ("int8", 5), ("int4", 3)):
        values, places, *_ = halved(64, 256, format, 64, asymmetric=False)
        assert (values.nbytes + places.nbytes) * 8 == bits * 64 * 256
        tiled = tiles.tile_halves(values, format, 64).nbytes + tiles.tile_places(places, 64).nbytes
        assert tiled * 8 == bits * 64 * 256
