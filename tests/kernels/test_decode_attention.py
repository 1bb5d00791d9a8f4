"""Split attention in the interpreter: the op's reference over plain, paged and quantized caches, and a split against the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.interpreted import TOLERANCE, runner

from graphwright.errors import BackendError
from graphwright.kernels.triton import decode_attention
from graphwright.kernels.triton.decode_attention import Codes, Pages
from graphwright.numerics import relative_error
from graphwright.op import OPS
from graphwright.ops import attention as op


def check(number, *args, **kwargs):
    actual = decode_attention.attention(runner(number), *args, **kwargs)
    expected = op.reference(*args, **kwargs)
    assert relative_error(actual, expected) < TOLERANCE[expected.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_sample_of_the_op(dtype):
    torch.manual_seed(0)
    for number, sample in enumerate(OPS["attention"].samples_of(dtype)):
        check(number, *sample.args, **sample.kwargs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize(("batch", "keys"), [(1, 1), (17, 3), (2, 300), (1, 700)])
def test_a_step_over_a_cache_that_is_partly_filled(heads, kv_heads, keys, batch):
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 2, 24, dtype=torch.float16)
    key, value = (torch.randn(batch, kv_heads, keys, 24, dtype=torch.float16) for _ in range(2))
    filled = torch.randint(1, keys + 1, (batch, 1))
    key_at = torch.arange(keys).expand(batch, keys)
    key_at = torch.where(key_at < filled, key_at, -1)
    query_at = filled - 1 + torch.arange(2)
    sinks = torch.randn(heads)
    check(keys, query, key, value, query_at, key_at, None, None, sinks, 0.2, True, window=200)
    check(keys, query, key, value, query_at, key_at, None, torch.rand(heads), None, 0.2, True, softcap=5.0)


@given(cut=st.integers(1, 699), seed=st.integers(0, 50))
@settings(max_examples=6, deadline=None)
def test_attention_over_a_split_cache_equals_the_whole(cut, seed):
    torch.manual_seed(seed)
    query, key, value = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 700, 16), torch.randn(1, 1, 700, 16)
    whole = decode_attention.attention(runner(), query, key, value, *[None] * 5, 0.3, False)
    turned = [torch.cat([x[:, :, cut:], x[:, :, :cut]], dim=2) for x in (key, value)]
    assert relative_error(decode_attention.attention(runner(2), query, *turned, *[None] * 5, 0.3, False), whole) < 2e-5


def test_the_cache_is_split_as_the_device_wants_it():
    device = runner().device
    assert decode_attention.split(1, 100, device) == (1, 128)
    splits, span = decode_attention.split(8, 32768, device)
    assert 1 < splits <= 64
    assert (splits - 1) * span < 32768 <= splits * span


@pytest.mark.parametrize("page", [16, 1])
def test_paged_cache(page):
    torch.manual_seed(0)
    lengths = torch.tensor([5, 300, 17], dtype=torch.int32)
    pages = -(-int(lengths.max()) // page)
    key, value = (torch.randn(3 * pages, 2, page, 16) for _ in range(2))
    table = torch.randperm(3 * pages).view(3, pages).int()
    query = torch.randn(3, 4, 2, 16)
    actual = decode_attention.attention(
        runner(1), query, key, value, *[None] * 5, 0.3, True, pages=Pages(table, lengths)
    )
    for row, length in enumerate(lengths.tolist()):
        flat = [x[table[row].long()].transpose(0, 1).flatten(1, 2)[None, :, :length] for x in (key, value)]
        at = torch.arange(length - 2, length)[None]
        expected = op.reference(query[row : row + 1], *flat, at, None, None, None, None, 0.3, True)
        assert relative_error(actual[row : row + 1], expected) < 2e-5


def quantized(shape, kind):
    batch, heads, keys, dim = shape
    if kind == "int8":
        return Codes(torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(batch, heads, keys) * 0.02)
    if kind == "fp8":
        return Codes(torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(batch, heads, keys))
    packed = torch.randint(0, 256, (batch, heads, keys, dim // 2), dtype=torch.uint8)
    steps = (batch, heads, keys)
    return Codes(packed, torch.rand(steps) * 0.2, torch.randint(0, 16, steps).float(), bits=4)


@pytest.mark.parametrize(("key_kind", "value_kind"), [("int8", "int8"), ("fp8", "fp8"), ("int4", "int4")])
@pytest.mark.parametrize("keys", [9, 333])
def test_quantized_caches(key_kind, value_kind, keys):
    torch.manual_seed(0)
    key, value = quantized((2, 2, keys, 32), key_kind), quantized((2, 2, keys, 32), value_kind)
    query = torch.randn(2, 6, 1, 32)
    at = torch.tensor([[keys - 1], [keys // 2]])
    actual = decode_attention.attention(runner(1), query, key, value, at, None, None, None, None, 0.2, True)
    expected = op.reference(query, key.dequantize(), value.dequantize(), at, None, None, None, None, 0.2, True)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("kind", ["int8", "fp8 bits", "int4"])
def test_codes_in_pages(kind):
    torch.manual_seed(0)
    table = torch.tensor([[4, 0, 6], [5, 3, -1]])
    shape = (7, 2, 16, 32)
    codes = [quantized(shape, kind.split()[0]) for _ in range(2)]
    if kind == "int4":
        codes = [Codes(one.codes, one.scale, bits=4) for one in codes]
    if kind == "fp8 bits":
        codes = [Codes(one.codes.view(torch.uint8), one.scale) for one in codes]
    query, at, keys = torch.randn(2, 6, 2, 32), torch.tensor([[39, 40], [20, -1]]), torch.arange(41)[None]
    actual = decode_attention.attention(
        runner(1), query, *codes, at, keys, None, None, None, 0.2, True, pages=Pages(table, keys=41)
    )
    flat = [one.dequantize()[table.clamp(min=0)].transpose(1, 2).flatten(2, 3)[:, :, :41] for one in codes]
    assert relative_error(actual, op.reference(query, *flat, at, keys, None, None, None, 0.2, True)) < 1e-4


def test_refusals():
    query, cache = torch.zeros(1, 65, 1, 16), torch.zeros(1, 1, 4, 16)
    with pytest.raises(BackendError, match="65 queries.*64"):
        decode_attention.attention(runner(), query, cache, cache, *[None] * 5, 1.0, True)
