"""Integers in 32-bit words: the inverse of packing a row as one long integer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interchange.making import packed_rows

from graphwright import packing
from graphwright.interchange.words import pack_words, stored, stored_zero, unpack_words


@given(bits=st.integers(1, 8), rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_words_hold_a_row_of_bits(bits, rows, count, seed):
    values = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    words = packed_rows(values, bits)
    assert torch.equal(pack_words(values, bits), words)
    assert torch.equal(unpack_words(words, bits, count).long(), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("width", [64, 56])
def test_stored_codes_stand_for_the_same_numbers(bits, width):
    codes = torch.randint(0, 1 << bits, (5, width), dtype=torch.uint8)
    groups = -(-width // 32)
    zero = torch.randint(0, 1 << bits, (5, groups), dtype=torch.uint8)
    scale = torch.rand(5, groups)
    weight, format = stored(codes, bits, 32)
    dense = packing.dequantize(weight, scale, stored_zero(zero, bits), format, 32)[:, :width]
    group = torch.arange(width) // 32
    assert torch.equal(dense, (codes.float() - zero[:, group].float()) * scale[:, group])


def test_zero_points_in_the_middle_are_none():
    assert stored_zero(torch.full((2, 3), 8, dtype=torch.uint8), 4) is None
    assert stored_zero(torch.full((2, 3), 7, dtype=torch.uint8), 4) is not None
