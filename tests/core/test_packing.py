"""Packed layouts: round trips are bit-exact, and dequantizing follows the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright import packing
from graphwright.numerics import relative_error
from graphwright.ops import quantized_embedding, quantized_linear


@given(
    format=st.sampled_from(sorted(packing.FORMATS)),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    units=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=120)
def test_round_trip_is_bit_exact(format, rows, groups, units, seed):
    kind = packing.FORMATS[format]
    group = units * kind.unit
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(kind.low, kind.high + 1, (rows, groups * group), generator=generator)
    packed = packing.pack(codes, kind.name, group)
    assert packed.dtype == kind.storage
    assert packed.numel() * 8 == codes.numel() * kind.bits
    assert torch.equal(packing.unpack(packed, kind.name, group).long(), codes)


@pytest.mark.parametrize("format", ["int2", "int3", "int4"])
def test_the_first_code_lies_in_the_lowest_bits(format):
    kind = packing.FORMATS[format]
    codes = torch.zeros(1, kind.unit, dtype=torch.long)
    codes[0, 0] = kind.high
    first = int(packing.pack(codes, format, kind.unit)[0, 0])
    assert first == (3 if format == "int3" else kind.high)


def finite_codes(kind: packing.Format) -> torch.Tensor:
    codes = torch.arange(kind.low, kind.high + 1)
    return codes[packing.decode(codes, kind.name).isfinite()]


@pytest.mark.parametrize("format", sorted(packing.FORMATS))
def test_encode_finds_every_value_that_a_code_stands_for(format):
    kind = packing.FORMATS[format]
    values = packing.decode(finite_codes(kind), format)
    assert torch.equal(packing.decode(packing.encode(values, format), format), values)


@pytest.mark.parametrize("format", [name for name, kind in packing.FORMATS.items() if not kind.integer])
def test_encode_is_nearest(format):
    values = packing.decode(finite_codes(packing.FORMATS[format]), format)
    x = torch.linspace(-1, 1, 401) * values.max()
    found = packing.decode(packing.encode(x, format), format)
    best = (x[:, None] - values).abs().amin(1)
    assert torch.equal((x - found).abs(), best)


def test_nf4_is_the_published_table():
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    assert torch.allclose(torch.tensor(packing.FORMATS["nf4"].table), torch.tensor(published), atol=2e-6)


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
