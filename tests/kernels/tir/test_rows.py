"""Kernels over rows: norms, quantization, rotary embedding, cache updates, embedding tables."""

import pytest
import torch
from kernels.tir.running import code_rows, dense, nowhere, run, size, split_rows
from torch.nn import functional

from graphwright.kernels.tir import rope as rope_kernels
from graphwright.kernels.tir import tiles
from graphwright.kernels.tir.embedding import embedding as embedding_kernel
from graphwright.kernels.tir.emit import Layout
from graphwright.kernels.tir.gated_activation import gated_activation as gated_kernel
from graphwright.kernels.tir.linear import Linear
from graphwright.kernels.tir.normalize import Norm, normalize
from graphwright.kernels.tir.quantize import CodeRow
from graphwright.kernels.tir.quantize import quantize as quantize_kernel
from graphwright.numerics import relative_error
from graphwright.ops import gated_activation, kv_cache_update, quantized_embedding, rms_norm, rope
from graphwright.rounding import quantize
from graphwright.scheme import Scheme

B, S = size("batch"), size("sequence")


@pytest.mark.parametrize(
    "row",
    [
        *(CodeRow(*sizes) for sizes in ((96, 32), (80, 80), (100, 8), (576, 64), (30, 16))),
        *(CodeRow(*sizes, grouped=True) for sizes in ((96, 32), (64, 8), (576, 64))),
    ],
    ids=str,
)
def test_quantize(row):
    x = torch.randn(2, 3, row.width)
    x[0, 1] = 0
    rows = torch.full((2, 3, row.bytes), 9, dtype=torch.int8)
    run(quantize_kernel(dense(B, S, row.width), row), x, rows)
    for found, expected in zip(split_rows(rows, row), split_rows(code_rows(x, row), row), strict=True):
        assert torch.equal(found, expected)


def test_quantize_reads_strided_rows():
    x = torch.randn(2, 3, 128)
    row = CodeRow(64, 32)
    rows = torch.empty(2, 3, row.bytes, dtype=torch.int8)
    layout = Layout((B, S, 128), (B, S, 64), (S * 128, 128, 1), 32)
    run(quantize_kernel(layout, row), x, rows)
    expected = code_rows(x[..., 32:96].contiguous(), row)
    assert torch.equal(split_rows(rows, row)[0], split_rows(expected, row)[0])


NORMS = [
    Norm("rms", 1e-6),
    Norm("rms", 1e-5, unit_offset=True),
    Norm("rms", 1e-6, weight=False),
    Norm("layer", 1e-5, bias=True),
]


@pytest.mark.parametrize("width", [96, 80, 36, 7])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_normalize(norm, width):
    x, weight, bias = torch.randn(2, 3, width) + 0.5, torch.randn(width), torch.randn(width)
    if norm.kind == "rms":
        expected = rms_norm(x, weight if norm.weight else None, norm.eps, norm.unit_offset)
    else:
        expected = functional.layer_norm(x, (width,), weight, bias, norm.eps)
    given = [x] + [weight] * norm.weight + [bias] * norm.bias
    out = nowhere(2, 3, width)
    run(normalize(norm, dense(B, S, width)), *given, out)
    assert relative_error(out, expected) < 5e-6
    row = CodeRow(width, 8)
    rows = torch.empty(2, 3, row.bytes, dtype=torch.int8)
    run(normalize(norm, dense(B, S, width), row), *given, rows)
    codes, sums, step = split_rows(rows, row)
    # A code may differ by one where the norm's last bit decides how it is rounded.
    assert ((codes[..., :width] * step - expected).abs() <= step * 0.5001).all()
    assert torch.equal(sums, codes.unflatten(-1, (-1, 8)).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation(activation):
    x = torch.randn(2, 3, 72) * 3
    halves = [Layout((B, S, 72), (B, S, 36), (S * 72, 72, 1), start) for start in (0, 36)]
    out = nowhere(2, 3, 36)
    run(gated_kernel(activation, *halves), x, x, out)
    assert relative_error(out, gated_activation(*x.chunk(2, -1), activation)) < 5e-6


@pytest.mark.parametrize(("heads", "head_dim", "half"), [(3, 64, 32), (2, 80, 40), (1, 96, 12), (2, 8, 1)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_rope_and_cache(heads, head_dim, half, interleaved, shared):
    inv_freq = 10000.0 ** -(torch.arange(0, 2 * half, 2) / (2 * half))
    x = torch.randn(2, 5, heads * head_dim)
    positions = torch.randint(0, 3000, (1 if shared else 2, 5))
    at = dense(1, S) if shared else dense(B, S)
    cos, sin = nowhere(*positions.shape, half), nowhere(*positions.shape, half)
    run(rope_kernels.table(at, half, 1.25), positions, inv_freq, cos, sin)
    width = heads * head_dim
    layout = Layout((B, S, width), (B, heads, S, head_dim), (S * width, head_dim, width, 1))
    rotation = rope_kernels.Rotation(half, interleaved)
    out = nowhere(2, 5, heads, head_dim)
    run(rope_kernels.rotate(rotation, layout, at), x, cos, sin, out)
    view = x.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    expected = rope(view, positions, inv_freq, 1.25, interleaved)
    assert relative_error(out.transpose(1, 2), expected) < 5e-6

    slots = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 6, 0, 1]])
    capacity = size("capacity")
    cache_layout = dense(B, heads, capacity, head_dim)
    for turned, value in ((rotation, expected), (rope_kernels.Rotation(), view)):
        cache = torch.zeros(2, heads, 8, head_dim)
        reference = cache.clone()
        tables = [cos, sin] if turned.half else []
        function = rope_kernels.update_cache(
            turned, layout, cache_layout, dense(B, S), at if turned.half else None, "float32"
        )
        run(function, x, slots, *tables, cache)
        kv_cache_update(reference, value, slots)
        assert relative_error(cache[:, :, :7], reference[:, :, :7]) < 5e-6


@pytest.mark.parametrize(
    ("width", "format", "group", "asymmetric"),
    [
        (40, "int8", 40, False),
        (40, "int4", 8, True),
        (40, "int4", 40, False),
        (37, "int4", 8, True),
        (6, "int8", 4, False),
    ],
)
def test_embedding(width, format, group, asymmetric):
    scheme = Scheme(format=format, group_size=group, symmetric=not asymmetric)
    done = quantize(torch.randn(37, width), scheme)
    packed, scale, zero = done.packed, done.grid.scale, done.grid.zero_point
    indices = torch.randint(0, 37, (2, 5))
    given = [indices, tiles.tile_codes(packed, format, group), tiles.tile_groups(scale)]
    if zero is not None:
        given.append(tiles.tile_zero_points(zero, format))
    out = nowhere(2, 5, width)
    run(embedding_kernel(Linear(37, width, format, group, asymmetric, "float16"), (B, S)), *given, out)
    assert torch.equal(out, quantized_embedding(indices, packed, scale, zero, format, group, width, torch.float32))


def test_embedding_of_floats():
    table, indices = torch.randn(37, 21), torch.randint(0, 37, (4, 3))
    out = nowhere(4, 3, 21)
    run(embedding_kernel(Linear(37, 21, "float32", 21), (B, S)), indices, tiles.tile_floats(table).contiguous(), out)
    assert torch.equal(out, table[indices])
