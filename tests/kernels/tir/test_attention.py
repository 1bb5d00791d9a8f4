"""Attention kernels against the op's reference, over its samples and a grid of head shapes."""

import itertools

import pytest
import torch
from kernels.tir.running import HOST, dense, nowhere, run, size

from graphwright.backends.tvm.translate import dtype_of
from graphwright.kernels.tir import attention as kernels
from graphwright.kernels.tir import attention_vectors
from graphwright.kernels.tir.isa import choose
from graphwright.numerics import relative_error
from graphwright.ops import attention, dequantize_tokens, quantize_tokens

OPTIONS = ("window", "chunk", "prefix", "softcap", "anchors", "block")
TOLERANCE = 2e-5
"""Elementwise; the polynomials of exp and tanh are good to 3e-7 of their largest value."""

SAMPLES = [s for s in attention.samples_of(torch.float32) if s.args[5] is None]


def kernel_output(
    sample, decode: bool, parts: int = 3, scales: tuple = (), lanes: int = choose(HOST.features).lanes
) -> torch.Tensor:
    """[B, H, S, Dv] of the kernel for a sample of the op; with `scales`, keys and values are codes."""
    query, key, value, query_at, key_at, _, slopes, sinks, scale, causal, *rest = sample
    batch, heads, length, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    options = dict(zip(OPTIONS, rest, strict=False))
    described = kernels.Attention(
        heads,
        kv_heads,
        head_dim,
        value_dim,
        scale,
        causal,
        alibi=slopes is not None,
        sinks=sinks is not None,
        **options,
    )
    b, t = size("batch"), size("keys")
    s = 1 if decode else size("sequence")

    def positions(given, length):
        return None if given is None else dense(1 if given.shape[0] == 1 else b, length)

    operands = kernels.Operands(
        dense(b, heads, s, head_dim),
        dense(b, kv_heads, t, head_dim),
        dense(b, kv_heads, t, value_dim),
        positions(query_at, s),
        positions(key_at, t),
        *(dense(b, kv_heads, t, 1) for _ in scales),
        **({} if scales else {"key_dtype": dtype_of(key), "value_dtype": dtype_of(value)}),
    )
    given = [query, key, value, *scales, *(x for x in (query_at, key_at, slopes, sinks) if x is not None)]
    out = nowhere(batch, length, heads, value_dim)
    if decode:
        parts_out = nowhere(batch, kv_heads, parts, heads // kv_heads, value_dim + 2)
        run(kernels.decode(described, operands, parts), *given, out, parts_out)
    else:
        run(attention_vectors.prefill(described, operands, parts, lanes), *given, out)
    return out.transpose(1, 2)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.note)
def test_samples(sample):
    expected = attention(*sample.args)
    assert relative_error(kernel_output(sample.args, decode=False), expected) < TOLERANCE
    if sample.args[0].shape[2] == 1:
        assert relative_error(kernel_output(sample.args, decode=True), expected) < TOLERANCE


@pytest.mark.parametrize("head_dim", [64, 80, 96, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
def test_head_shapes(head_dim, heads, kv_heads):
    torch.manual_seed(0)
    for queries, keys in ((1, 1), (1, 67), (2, 33), (9, 40), (35, 70)):
        query = torch.randn(2, heads, queries, head_dim)
        key, value = torch.randn(2, kv_heads, keys, head_dim), torch.randn(2, kv_heads, keys, head_dim + 4)
        query_at = torch.arange(keys - queries, keys)[None].repeat(2, 1)
        query_at[1] -= 1
        sample = (query, key, value, query_at, torch.arange(keys)[None], None, None, None, head_dim**-0.5, True)
        expected = attention(*sample)
        assert relative_error(kernel_output(sample, decode=False), expected) < TOLERANCE
        if queries == 1:
            assert relative_error(kernel_output(sample, decode=True), expected) < TOLERANCE


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_registers_of_any_width(lanes):
    """Compiled for this machine, whose code generator makes do with the registers that there are."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 35, 24), torch.randn(2, 2, 70, 24), torch.randn(2, 2, 70, 22)
    query_at = torch.arange(35, 70)[None].repeat(2, 1)
    sample = (query, key, value, query_at, torch.arange(70)[None], None, None, torch.randn(6), 0.2, True)
    assert relative_error(kernel_output(sample, decode=False, lanes=lanes), attention(*sample)) < TOLERANCE


OPTIONS_OF_FEW = ((), (5,), (0, 7), (0, 0, 3, 30.0))
FEW_CASES = [(options, held_as) for held_as in ("float32", "int8") for options in OPTIONS_OF_FEW]
FEW_CASES += [((5,), "float16"), ((0, 0, 3, 30.0), "float16")]


@pytest.mark.parametrize(("options", "held_as"), FEW_CASES, ids=str)
def test_few_queries_are_the_same_to_the_bit_alone_and_in_company(options, held_as):
    """So verifying guesses, or decoding several sequences at once, changes no token."""
    torch.manual_seed(0)
    queries, keys = kernels.FEW, 67
    query = torch.randn(2, 9, queries, 24)
    held, scales = [torch.randn(2, 3, keys, 24) for _ in range(2)], ()
    if held_as == "int8":
        held, scales = zip(*(quantize_tokens(tensor, "int8") for tensor in held), strict=True)
    elif held_as == "float16":
        held = [tensor.half() for tensor in held]
    query_at = torch.arange(keys - queries, keys)[None].repeat(2, 1)
    rest = (torch.arange(keys)[None], None, torch.rand(9), torch.randn(9), 0.2, True, *options)

    def one(tensor, axis, index):
        return tensor.narrow(axis, index, 1).contiguous()

    together = kernel_output((query, *held, query_at, *rest), decode=False, scales=tuple(scales))
    alone = [
        kernel_output((one(query, 2, i), *held, one(query_at, 1, i), *rest), decode=True, scales=tuple(scales))
        for i in (0, 1, queries - 1)
    ]
    assert torch.equal(together[:, :, [0, 1, queries - 1]], torch.cat(alone, 2))


@pytest.mark.parametrize("decode", [True, False])
def test_the_room_in_the_cache_does_not_matter(decode):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 1, 24), torch.randn(1, 2, 300, 24), torch.randn(1, 2, 300, 24)
    rest = (None, None, None, 0.2, True)
    found = []
    for keys in (70, 71, 128, 300):
        key_at = torch.arange(keys)[None]
        key_at[:, 70:] = -1
        held = (key[:, :, :keys].contiguous(), value[:, :, :keys].contiguous())
        found.append(kernel_output((query, *held, torch.tensor([[69]]), key_at, *rest), decode))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), list(itertools.product([0, 5], [0.0, 30.0], [False, True]))
)
def test_decode_options(window, softcap, with_sinks):
    query, key, value = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    query_at = torch.tensor([[40], [7]])
    key_at = torch.arange(50)[None].repeat(2, 1)
    key_at[1, :3] = -1
    sinks, slopes = (torch.randn(4), torch.rand(4)) if with_sinks else (None, None)
    sample = (query, key, value, query_at, key_at, None, slopes, sinks, 0.2, True, window, 0, 0, softcap)
    assert relative_error(kernel_output(sample, decode=True), attention(*sample)) < TOLERANCE


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 20)])
def test_keys_and_values_as_int8_codes(heads, kv_heads, head_dim):
    torch.manual_seed(1)
    for queries, keys in ((1, 67), (5, 33)):
        query = torch.randn(2, heads, queries, head_dim)
        key, value = (
            quantize_tokens(torch.randn(2, kv_heads, keys, width), "int8") for width in (head_dim, head_dim + 4)
        )
        query_at = torch.arange(keys - queries, keys)[None].repeat(2, 1)
        rest = (query_at, torch.arange(keys)[None], None, None, None, head_dim**-0.5, True)
        expected = attention(query, *(dequantize_tokens(*held, "int8", torch.float32) for held in (key, value)), *rest)
        codes = (query, key[0], value[0], *rest)
        for decode in (False, True) if queries == 1 else (False,):
            found = kernel_output(codes, decode, scales=(key[1], value[1]))
            assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "options"),
    [
        (4, 4, 64, ()),
        (6, 2, 80, (5,)),
        (8, 1, 96, (0, 7)),
        (3, 1, 128, (16, 0, 0, 0.0, 3)),
        (4, 4, 20, (0, 0, 3, 30.0)),
    ],
    ids=str,
)
def test_keys_and_values_as_halves(heads, kv_heads, head_dim, options):
    """The op's reference widens them too, so that only the order of sums differs."""
    torch.manual_seed(1)
    for queries, keys in ((1, 67), (5, 33), (35, 70)):
        query = torch.randn(2, heads, queries, head_dim)
        key = torch.randn(2, kv_heads, keys, head_dim).half()
        value = torch.randn(2, kv_heads, keys, head_dim + 4).half()
        key_at = torch.arange(keys)[None].repeat(2, 1)
        key_at[1, :3] = -1
        query_at = torch.arange(keys - queries, keys)[None].repeat(2, 1)
        sinks = torch.randn(heads) if options else None
        sample = (query, key, value, query_at, key_at, None, None, sinks, head_dim**-0.5, True, *options)
        expected = attention(*sample)
        for decode in (False, True) if queries == 1 else (False,):
            assert relative_error(kernel_output(sample, decode), expected) < TOLERANCE


LIMITS = [(5, 0, 3, 0), (16, 0, 0, 8), (24, 0, 9, 8), (0, 7, 2, 0), (40, 0, 4, 0), (4, 0, 0, 4)]


@pytest.mark.parametrize(("window", "chunk", "anchors", "block"), LIMITS)
@pytest.mark.parametrize("causal", [True, False])
def test_windows_with_anchors_and_blocks(window, chunk, anchors, block, causal):
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 131, 16), torch.randn(2, 2, 131, 16)
    key_at = torch.arange(131)[None].repeat(2, 1)
    key_at[1] = torch.randperm(131)
    key_at[1, :3] = -1
    for queries, last in ((1, 131), (1, 2), (37, 131), (70, 70)):
        query_at = torch.arange(last - queries, last)[None].repeat(2, 1)
        query = torch.randn(2, 4, queries, 16)
        rest = (None, None, None, 0.25, causal, window, chunk, 0, 0.0, anchors, block)
        sample = (query, key, value, query_at, key_at, *rest)
        expected = attention(*sample)
        for decode in (False, True)[: 2 if queries == 1 else 1]:
            assert relative_error(kernel_output(sample, decode), expected) < TOLERANCE


@pytest.mark.parametrize("decode", [False, True])
def test_blocks_that_no_query_sees_are_not_read(decode):
    """What a kernel skips may hold anything: NaN there would spread through every sum it takes part in."""
    torch.manual_seed(0)
    queries = 1 if decode else 32
    query, key, value = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 512, 16), torch.randn(1, 2, 512, 16)
    query_at, key_at = torch.arange(512 - queries, 512)[None], torch.arange(512)[None]
    sample = (query, key, value, query_at, key_at, None, None, None, 0.25, True, 64, 0, 0, 0.0, 4)
    expected = attention(*sample)
    first = 512 - queries - 64 - 32
    poisoned = [tensor.clone() for tensor in (key, value)]
    for tensor in poisoned:
        tensor[:, :, 32:first] = float("nan")
    found = kernel_output((query, *poisoned, *sample[3:]), decode)
    assert relative_error(found, expected) < TOLERANCE
