"""Linear kernels over floating-point activations, in every vector width, against the eager reference."""

import pytest
import torch
from kernels.tir.running import nowhere, one_by_one, run, size
from torch.nn import functional

from graphwright.kernels.tir import tiles
from graphwright.kernels.tir.float_linear import matrix, vector
from graphwright.kernels.tir.linear import Linear
from graphwright.numerics import relative_error
from graphwright.ops import quantized_linear
from graphwright.rounding import quantize
from graphwright.scheme import Scheme

LEAD = (size("batch"), size("sequence"))
LAYERS = [
    # N, K, format, group, asymmetric, bias, residual, activation
    (48, 64, "float32", 64, False, False, False, ""),
    (37, 83, "float32", 83, False, True, True, ""),
    (96, 5, "float32", 5, False, True, False, "silu"),
    (16, 8, "float32", 8, False, False, False, ""),
    (48, 64, "int4", 32, True, False, False, ""),
    (40, 100, "int4", 32, False, True, True, ""),
    (33, 82, "int8", 20, False, True, False, ""),
    (64, 70, "int8", 24, True, False, True, ""),
    (96, 64, "int4", 64, True, True, False, "gelu_tanh"),
]


def made(rows: int, case: tuple) -> tuple[Linear, list[torch.Tensor], torch.Tensor]:
    """A layer, the arguments of its kernel, and what the op makes of them."""
    outputs, width, format, group, asymmetric, with_bias, with_residual, activation = case
    weight, bias = torch.randn(outputs, width), torch.randn(outputs) if with_bias else None
    x = torch.randn(1, rows, width)
    if format == "float32":
        arguments = [x, tiles.tile_floats(weight).contiguous()]
        expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()
    else:
        done = quantize(weight, Scheme(format=format, group_size=group, symmetric=not asymmetric))
        packed, scale, zero = done.packed, done.grid.scale, done.grid.zero_point
        arguments = [x, tiles.tile_codes(packed, format, group), tiles.tile_groups(scale)]
        arguments += [] if zero is None else [tiles.tile_zero_points(zero, format)]
        expected = quantized_linear(x, packed, scale, zero, bias, format, group)
    if bias is not None:
        arguments.append(bias)
    if activation:
        gate, up = expected.chunk(2, -1)
        expected = (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up
    if with_residual:
        arguments.append(torch.randn_like(expected))
        expected = expected + arguments[-1]
    scale_dtype = "" if format == "float32" else "float16"
    layer = Linear(outputs, width, format, group, asymmetric, scale_dtype, with_bias, with_residual, activation)
    return layer, arguments, expected


def check(rows: int, case: tuple, lanes: int) -> float:
    """Relative error of a kernel against the op."""
    layer, arguments, expected = made(rows, case)
    out = nowhere(1, rows, layer.width)
    run(vector(layer, lanes, (1, 1)) if rows == 1 else matrix(layer, lanes, LEAD), *arguments, out)
    return relative_error(out, expected)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_kernels_equal_the_reference(case):
    torch.manual_seed(0)
    # 12 rows fill a block of registers; 3, 17 and 31 leave rests.
    for rows in (1, 3, 12, 31):
        assert check(rows, case, 16) < 2e-6


@pytest.mark.parametrize("lanes", [4, 8])
def test_narrower_vectors_equal_the_reference(lanes):
    torch.manual_seed(0)
    for rows, case in ((1, LAYERS[1]), (7, LAYERS[1]), (1, LAYERS[4]), (17, LAYERS[8])):
        assert check(rows, case, lanes) < 2e-6


def test_more_rows_than_a_task_takes():
    for case in (LAYERS[0], LAYERS[5]):
        assert check(261, case, 16) < 2e-6


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_row_is_the_same_to_the_bit_alone_and_in_company(case, rows):
    """So verifying guesses, or decoding several sequences at once, changes no token."""
    torch.manual_seed(0)
    layer, arguments, _ = made(rows, case)
    together = nowhere(1, rows, layer.width)
    run(matrix(layer, 16, LEAD), *arguments, together)
    alone = one_by_one(vector(layer, 16, (1, 1)), layer, arguments, rows)
    assert torch.equal(together, alone)
