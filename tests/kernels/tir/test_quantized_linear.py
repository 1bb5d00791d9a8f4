"""Low-bit linear kernels of every instruction set that this machine has, against the eager reference."""

import re
from dataclasses import replace

import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.tir.running import HOST, code_rows, nowhere, one_by_one, run, size
from torch.nn import functional

from graphwright import packing
from graphwright.backends.tvm.build import build_kernels
from graphwright.kernels.tir import amx, tiles
from graphwright.kernels.tir.isa import ISAS, Isa, choose
from graphwright.kernels.tir.linear import Linear
from graphwright.kernels.tir.quantized_linear import code_row, matrix, vector
from graphwright.numerics import relative_error
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.rounding import quantize
from graphwright.scheme import Scheme

HERE = [isa for isa in ISAS if isa.needs <= set(HOST.features)]

LEAD = (size("batch"), size("sequence"))
LAYERS = [
    # N, K, format, group, asymmetric, bias, residual, activation
    (48, 64, "int4", 32, True, False, False, ""),
    (40, 96, "int4", 32, False, True, True, ""),
    (16, 100, "int4", 64, True, False, False, ""),
    (33, 80, "int8", 80, False, True, False, ""),
    (64, 72, "int8", 24, True, False, True, ""),
    (96, 64, "int4", 64, True, True, False, "silu"),
    (32, 160, "int8", 160, False, False, False, "gelu_tanh"),
    # … and activations that share a step: as many as a group, or fewer
    (48, 96, "int4", 32, True, False, True, "", 32),
    (40, 128, "int4", 64, False, True, False, "", 32),
    (33, 96, "int8", 96, False, False, False, "", 32),
    (64, 64, "int4", 32, True, False, False, "silu", 8),
]


def made(rows: int, case: tuple, draw=torch.randn) -> tuple[Linear, list[torch.Tensor], torch.Tensor]:
    """A layer, the arguments of its kernel, and what the op makes of them on the same codes."""
    outputs, width, format, group, asymmetric, with_bias, with_residual, activation, *shared = case
    code_group = shared[0] if shared else 0
    scheme = Scheme(format=format, group_size=group, symmetric=not asymmetric)
    done = quantize(draw(outputs, width), scheme)
    packed, scale, zero = done.packed, done.grid.scale, done.grid.zero_point
    x, bias = draw(1, rows, width), torch.randn(outputs) if with_bias else None
    options = (asymmetric, "float16", with_bias, with_residual, activation, code_group)
    layer = Linear(outputs, width, format, group, *options)
    expected = quantized_linear(
        quantize_dequantize(x, None, "int8", code_group), packed, scale, zero, bias, format, group
    )
    arguments = [code_rows(x, code_row(layer)), tiles.tile_codes(packed, format, group), tiles.tile_groups(scale)]
    if zero is not None:
        arguments.append(tiles.tile_zero_points(zero, format))
    if bias is not None:
        arguments.append(bias)
    if activation:
        gate, up = expected.chunk(2, -1)
        chosen = functional.silu if activation == "silu" else lambda g: functional.gelu(g, approximate="tanh")
        expected = chosen(gate) * up
    if with_residual:
        arguments.append(torch.randn_like(expected))
        expected = expected + arguments[-1]
    return layer, arguments, expected


def check(rows: int, case: tuple, isa: Isa, draw=torch.randn) -> float:
    """Relative error of a kernel against the op."""
    layer, arguments, expected = made(rows, case, draw)
    out = nowhere(1, rows, layer.width)
    run(vector(layer, isa, (1, 1)) if rows == 1 else matrix(layer, isa, LEAD), *arguments, out)
    return relative_error(out, expected)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_kernels_equal_the_reference(case):
    torch.manual_seed(0)
    # Sums of at most 160 products are exact in int32; what is left is float32 addition of the groups.
    for rows in (1, 3, 8, 17, 45):
        assert check(rows, case, HERE[0]) < 2e-6


@pytest.mark.parametrize("isa", HERE[1:], ids=lambda isa: isa.name)
def test_other_instruction_sets_equal_the_reference(isa):
    torch.manual_seed(0)
    for rows, case in ((1, LAYERS[0]), (5, LAYERS[1]), (1, LAYERS[3]), (5, LAYERS[4])):
        assert check(rows, case, isa) < 2e-6


@pytest.mark.parametrize("isa", HERE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_the_largest_products_do_not_overflow(format, sign, isa):
    """Some instruction sets add products in 16 bits first."""
    signs = iter((1.0, sign))
    for rows in (1, 5):
        case = (16, 256, format, 128, False, False, False, "")
        assert check(rows, case, isa, lambda *shape: torch.full(shape, next(signs, sign))) < 2e-6


def test_more_rows_than_a_task_takes():
    assert check(261, LAYERS[0], choose(HOST.features)) < 2e-6


@pytest.mark.parametrize(
    ("features", "instruction"),
    [
        (("avx2",), "vpmaddubsw.*ymm"),
        (("avx2", "avx512bw"), "vpmaddubsw.*zmm"),
        (("avx2", "avx512bw", "avx512_vnni"), "vpdpbusd"),
        (("avx2", "avx512bw", "avx512_vnni", "amx_int8", "amx_bf16"), "tdpbs[su]d"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_machine_code_holds_the_dot_product_of_its_instruction_set(features, instruction):
    """Compiled for machines that need not be this one."""
    target = replace(HOST, arch="x86_64", features=("fma", *features))
    for outputs, width, format, group, *options in (LAYERS[0], LAYERS[3]):
        layer = Linear(outputs, width, format, group, options[0], "float16")
        function = matrix(layer, choose(target.features), (size("batch"), size("sequence")))
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        code = build_kernels(module, target).inspect_source("asm")
        assert re.search(instruction, code), format


@pytest.mark.parametrize(("span", "codes"), [(32, 32), (64, 64), (576, 64), (80, 40), (24, 24), (8, 0), (4, 0)])
def test_tile_registers_are_filled_as_far_as_a_span_allows(span, codes):
    assert amx.depth(span) == codes


@given(
    format=st.sampled_from(["int4", "int8"]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_tiles_are_a_bit_exact_round_trip(format, rows, groups, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    kind, group = packing.FORMATS[format], 8 * steps
    codes = torch.randint(kind.low, kind.high + 1, (rows, groups * group), generator=generator)
    packed = packing.pack(codes, format, group)
    assert torch.equal(tiles.untile_codes(tiles.tile_codes(packed, format, group), format, group, rows), packed)
    zero = torch.randint(kind.low, kind.high + 1, (rows, groups), generator=generator).to(kind.storage)
    assert torch.equal(tiles.untile_zero_points(tiles.tile_zero_points(zero, format), format, rows), zero)
    scale = torch.rand(rows, groups, generator=generator)
    assert torch.equal(tiles.untile_groups(tiles.tile_groups(scale), rows), scale)


def test_the_best_instruction_set_is_chosen():
    assert choose(["avx2", "fma", "avx512bw", "avx512_vnni"]).name == "avx512_vnni"
    assert choose(["avx512bw", "avx512_vnni", "amx_int8", "amx_bf16"]).name == "amx"
    assert choose(["avx2", "fma"]).name == "avx2"
    assert choose(["asimd"]).name == "generic"
    assert choose(["asimd", "asimddp"]).name == "asimddp"


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_row_is_the_same_to_the_bit_alone_and_in_company(case, rows):
    """So verifying guesses, or decoding several sequences at once, changes no token."""
    torch.manual_seed(0)
    layer, arguments, _ = made(rows, case)
    together = nowhere(1, rows, layer.width)
    run(matrix(layer, HERE[0], LEAD), *arguments, together)
    alone = one_by_one(vector(layer, HERE[0], (1, 1)), layer, arguments, rows)
    assert torch.equal(together, alone)
