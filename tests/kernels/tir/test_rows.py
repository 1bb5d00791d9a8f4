"""Kernels over rows: norms, quantization, rotary embedding, cache updates, embedding tables."""

import pytest
import torch
from kernels.tir.running import dense, nowhere, run, size
from torch.nn import functional

from graphwright import packing
from graphwright.kernels.tir import rope as rope_kernels
from graphwright.kernels.tir import tiles
from graphwright.kernels.tir.emit import Layout
from graphwright.kernels.tir.normalize import Norm, normalize
from graphwright.kernels.tir.quantize import quantize as quantize_kernel
from graphwright.kernels.tir.quantized_embedding import quantized_embedding as embedding_kernel
from graphwright.kernels.tir.quantized_linear import QuantizedLinear
from graphwright.numerics import relative_error
from graphwright.ops import kv_cache_update, quantize_dequantize, quantized_embedding, rms_norm, rope
from graphwright.passes.quantize.rtn import quantize

B, S = size("batch"), size("sequence")


def restored(codes: torch.Tensor, step: torch.Tensor, width: int) -> torch.Tensor:
    return codes[..., :width].float() * step


@pytest.mark.parametrize(("width", "group"), [(96, 32), (80, 80), (100, 8), (576, 64), (30, 16)])
def test_quantize(width, group):
    x = torch.randn(2, 3, width)
    x[0, 1] = 0
    groups = -(-width // group)
    codes, sums, step = (
        torch.full((2, 3, groups * group), 9, dtype=torch.int8),
        torch.empty(2, 3, groups, dtype=torch.int32),
        nowhere(2, 3, 1),
    )
    run(quantize_kernel(dense(B, S, width), group), x, codes, sums, step)
    assert torch.equal(restored(codes, step, width), quantize_dequantize(x, None, "int8", 0))
    assert not codes[..., width:].any()
    assert torch.equal(sums, codes.unflatten(-1, (groups, group)).sum(-1, dtype=torch.int32))


def test_quantize_reads_strided_rows():
    x = torch.randn(2, 3, 128)
    codes, sums, step = (
        torch.empty(2, 3, 64, dtype=torch.int8),
        torch.empty(2, 3, 2, dtype=torch.int32),
        nowhere(2, 3, 1),
    )
    layout = Layout((B, S, 128), (B, S, 64), (S * 128, 128, 1), 32)
    run(quantize_kernel(layout, 32), x, codes, sums, step)
    assert torch.equal(restored(codes, step, 64), quantize_dequantize(x[..., 32:96], None, "int8", 0))


@pytest.mark.parametrize("width", [96, 80, 36, 7])
@pytest.mark.parametrize(
    "norm",
    [
        Norm("rms", 1e-6),
        Norm("rms", 1e-5, unit_offset=True),
        Norm("rms", 1e-6, weight=False),
        Norm("layer", 1e-5, bias=True),
    ],
)
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
    group = 8
    groups = -(-width // group)
    codes, sums, step = (
        torch.empty(2, 3, groups * group, dtype=torch.int8),
        torch.empty(2, 3, groups, dtype=torch.int32),
        nowhere(2, 3, 1),
    )
    run(normalize(norm, dense(B, S, width), group), *given, codes, sums, step)
    # A code may differ by one where the norm's last bit decides how it is rounded.
    assert ((restored(codes, step, width) - expected).abs() <= step * 0.5001).all()
    assert torch.equal(sums, codes.unflatten(-1, (groups, group)).sum(-1, dtype=torch.int32))


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
    ("format", "group", "asymmetric"), [("int8", 40, False), ("int4", 8, True), ("int4", 40, False)]
)
def test_embedding(format, group, asymmetric):
    codes, scale, zero = quantize(torch.randn(37, 40), format, group, not asymmetric, torch.float16)
    packed = packing.pack(codes, format, group)
    indices = torch.randint(0, 37, (2, 5))
    table = QuantizedLinear(37, scale.shape[1], group, format, asymmetric, "float16")
    given = [indices, tiles.tile_codes(packed, format, group), tiles.tile_groups(scale)]
    if zero is not None:
        given.append(tiles.tile_zero_points(zero, format))
    out = nowhere(2, 5, 40)
    run(embedding_kernel(table, dense(B, S), 40), *given, out)
    assert torch.equal(out, quantized_embedding(indices, packed, scale, zero, format, group, 40, torch.float32))
