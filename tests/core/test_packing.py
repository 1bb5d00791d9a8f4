"""Packed layouts: round trips are bit-exact, and dequantizing follows the formula."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright import packing
from graphwright.numerics import relative_error
from graphwright.ops import quantized_embedding, quantized_linear


@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    half=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_round_trip_is_bit_exact(bits, rows, groups, half, seed):
    kind = packing.FORMATS[f"int{bits}"]
    low, high = kind.low, kind.high
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, groups * 2 * half), generator=generator)
    packed = packing.pack(codes, kind.name, 2 * half)
    assert packed.dtype == kind.storage
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(packing.unpack(packed, kind.name, 2 * half).long(), codes)


def test_dequantize_by_hand():
    codes = torch.tensor([[0, 15, 8, 1]])
    packed = packing.pack(codes, "int4", 2)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, 8.0]])
    assert packing.dequantize(packed, scale, zero, "int4", 2).tolist() == [[-0.5, 7.0, 0.0, -14.0]]
    assert packing.dequantize(packed, scale, None, "int4", 2).tolist() == [[-4.0, 3.5, 0.0, -14.0]]


def test_linear_and_embedding_read_the_same_weight():
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (11, 64))
    packed, scale = packing.pack(codes, "int4", 32), torch.rand(11, 2)
    dense = packing.dequantize(packed, scale, None, "int4", 32)[:, :40]
    x = torch.randn(3, 2, 40)
    assert relative_error(quantized_linear(x, packed, scale, None, None, "int4", 32), x @ dense.T) < 1e-5
    rows = torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(quantized_embedding(rows, packed, scale, None, "int4", 32, 40, torch.float32), dense[rows])
