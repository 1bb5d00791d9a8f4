"""Flash attention in the interpreter against the op's reference, over masks, head ratios and odd lengths."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.interpreted import TOLERANCE, runner

from graphwright.errors import BackendError
from graphwright.kernels.triton import flash_attention
from graphwright.numerics import relative_error
from graphwright.op import OPS
from graphwright.ops import attention as op

DTYPES = [torch.float32, torch.float16]


def tensors(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32, value_dim=None):
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim))
    return tuple(torch.randn(batch, h, n, d, dtype=dtype) for h, n, d in shapes)


def check(number, *args, **kwargs):
    actual = flash_attention.attention(runner(number), *args, **kwargs)
    expected = op.reference(*args, **kwargs)
    assert relative_error(actual, expected) < TOLERANCE[expected.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample_of_the_op(dtype):
    torch.manual_seed(0)
    for number, sample in enumerate(OPS["attention"].samples_of(dtype)):
        check(number, *sample.args, **sample.kwargs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 65), (17, 150)])
def test_head_ratios_and_lengths(heads, kv_heads, queries, keys):
    torch.manual_seed(0)
    inputs = tensors(2, heads, kv_heads, queries, keys, 24, torch.float16)
    at = torch.arange(keys - queries, keys)[None, :]
    check(1, *inputs, at, None, None, None, None, 0.2, True)
    check(4, *inputs, None, None, None, None, None, 0.2, False)


MASKS = [
    {"causal": True},
    {"causal": True, "window": 40},
    {"causal": False, "window": 9},
    {"causal": True, "chunk": 33},
    {"causal": True, "prefix": 50},
    {"causal": True, "window": 20, "softcap": 3.0},
    {"causal": True, "window": 20, "anchors": 3},
    {"causal": True, "window": 24, "anchors": 20, "block": 8},
    {"causal": False, "window": 16, "anchors": 5, "block": 8},
    {"causal": True, "chunk": 33, "anchors": 2},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("positions", [False, True])
def test_masks_over_several_blocks(mask, positions):
    torch.manual_seed(0)
    inputs = tensors(2, 2, 1, 130, 130, 16)
    at = torch.stack([torch.arange(130), (torch.arange(130) - 37).clamp_min(-1)]) if positions else None
    check(4, *inputs, at, at, None, None, None, 0.25, **mask)


def test_slots_in_any_order_and_unused_ones():
    torch.manual_seed(0)
    query, key, value = tensors(1, 2, 2, 5, 200, 16)
    key_at = torch.full((1, 200), -1)
    key_at[0, torch.randperm(200)[:60]] = torch.arange(60)
    check(3, query, key, value, torch.arange(55, 60)[None], key_at, None, None, None, 0.25, True)
    check(0, query, key, value, torch.full((1, 5), -1), key_at, None, None, torch.randn(2), 0.25, True)


def test_bias_broadcast_alibi_and_sinks():
    torch.manual_seed(0)
    inputs = tensors(2, 4, 2, 33, 40, 16)
    slopes, sinks = torch.rand(4), torch.randn(4)
    for shape in ((1, 1, 33, 40), (2, 4, 33, 40), (2, 1, 1, 40)):
        bias = torch.randn(shape)
        bias[..., 3] = float("-inf")
        check(4, *inputs, None, None, bias, slopes, sinks, 0.25, True)


def test_values_of_another_width():
    torch.manual_seed(0)
    check(4, *tensors(1, 2, 1, 20, 20, 24, value_dim=40), None, None, None, None, None, 0.2, True)


@given(seed=st.integers(0, 1000), batch=st.integers(2, 4), kv_heads=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_permuting_batch_or_heads_permutes_the_result(seed, batch, kv_heads):
    torch.manual_seed(seed)
    query, key, value = tensors(batch, 2 * kv_heads, kv_heads, 7, 7, 16)

    def attend(q, k, v):
        return flash_attention.attention(runner(4), q, k, v, None, None, None, None, None, 0.25, True)

    whole = attend(query, key, value)
    rows, heads = torch.randperm(batch), torch.randperm(kv_heads)
    assert torch.equal(attend(query[rows], key[rows], value[rows]), whole[rows])
    spread = (2 * heads[:, None] + torch.arange(2)).flatten()
    assert torch.equal(attend(query[:, spread], key[:, heads], value[:, heads]), whole[:, spread])


def offsets_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def packed(lengths, heads, kv_heads, dim, dtype=torch.float32, key_lengths=None):
    key_lengths = key_lengths or lengths
    shapes = ((sum(lengths), heads, dim), (sum(key_lengths), kv_heads, dim), (sum(key_lengths), kv_heads, dim))
    return *(torch.randn(shape, dtype=dtype) for shape in shapes), offsets_of(lengths), offsets_of(key_lengths)


def check_packed(number, *args, **kwargs):
    actual = flash_attention.packed_attention(runner(number), *args, **kwargs)
    exact = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    expected = flash_attention.packed_reference(*exact, *kwargs.values())
    assert relative_error(actual, expected) < TOLERANCE[actual.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "causal", "window", "softcap"),
    [(1, 1, 64, True, 0, 0.0), (3, 1, 80, True, 9, 3.0), (8, 1, 96, True, 0, 0.0), (2, 2, 128, False, 0, 5.0)],
)
def test_packed_sequences(heads, kv_heads, dim, causal, window, softcap, dtype):
    torch.manual_seed(0)
    inputs = packed([1, 0, 66, 17] if heads < 8 else [1, 18], heads, kv_heads, dim, dtype)
    for sinks, slopes in ((torch.randn(heads), None), (None, torch.rand(heads))):
        order = {"window": window, "chunk": 0, "prefix": 0, "softcap": softcap}
        check_packed(dim // 16, *inputs, slopes, sinks, dim**-0.5, causal, **order)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_packed_queries_that_continue_their_keys(mask):
    """A decode step, a chunk of a prompt, no keys, more queries than keys, a whole prompt."""
    torch.manual_seed(0)
    inputs = packed([1, 7, 2, 9, 66], 2, 1, 16, key_lengths=[90, 40, 0, 4, 66])
    order = ("window", "chunk", "prefix", "softcap", "anchors", "block")
    options = {name: mask.get(name, 0) for name in order}
    check_packed(4, *inputs, None, None, 0.25, mask["causal"], **options)


@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(0, 40), min_size=2, max_size=5))
@settings(max_examples=4, deadline=None)
def test_a_packed_batch_is_each_sequence_alone_in_any_order(seed, lengths):
    torch.manual_seed(seed)
    query, key, value, ends, key_ends = packed(lengths, 2, 1, 16, key_lengths=[n + seed % 5 for n in lengths])

    def attend(parts, rows, keys):
        q, k, v = (torch.cat(part) for part in parts)
        starts = offsets_of(rows, torch.int64), offsets_of(keys, torch.int64)
        return flash_attention.packed_attention(runner(4), q, k, v, *starts, None, None, 0.25, True).split(rows)

    pairs = ((query, ends), (key, key_ends), (value, key_ends))
    cut = [x.split(offsets.diff().tolist()) for x, offsets in pairs]
    key_lengths = key_ends.diff().tolist()
    whole = attend(cut, lengths, key_lengths)
    order = torch.randperm(len(lengths)).tolist()
    turned = attend(*([[x[i] for i in order] for x in cut], *([x[i] for i in order] for x in (lengths, key_lengths))))
    for place, i in enumerate(order):
        assert torch.equal(turned[place], whole[i])
        (alone,) = attend([[x[i]] for x in cut], lengths[i : i + 1], key_lengths[i : i + 1])
        assert torch.equal(alone, whole[i])


def test_more_packed_sequences_than_one_look_at_the_offsets_takes():
    torch.manual_seed(0)
    lengths = torch.randint(0, 3, (70,)).tolist()
    both = torch.randn(sum(lengths), 3, 16).split([1, 2], dim=1)
    offsets = offsets_of(lengths)
    check_packed(5, both[0], *(both[1][:, i : i + 1] for i in range(2)), offsets, offsets, None, None, 0.25, True)


def test_packed_refusals():
    query, key, value, ends, key_ends = packed([2, 3], 2, 1, 16)

    def attend(*offsets, q=query):
        return flash_attention.packed_attention(runner(), q, key, value, *offsets, None, None, 1.0, True)

    with pytest.raises(BackendError, match=r"queries \[3\] and of keys \[2\] do not agree"):
        attend(ends, key_ends[:2])
    with pytest.raises(BackendError, match="query_offsets are torch.float32"):
        attend(ends.float(), key_ends)
    with pytest.raises(BackendError, match=r"key_offsets are \[0, 6, 5\] for 5 rows"):
        attend(ends, torch.tensor([0, 6, 5]))
    with pytest.raises(BackendError, match=r"query_offsets are \[0, 2, 5\] for 4 rows"):
        attend(ends, key_ends, q=query[:4])
    with pytest.raises(BackendError, match="3 heads are no multiple of 2"):
        wide = torch.zeros(5, 2, 16)
        flash_attention.packed_attention(
            runner(), torch.zeros(5, 3, 16), wide, wide, ends, key_ends, None, None, 1.0, True
        )


def test_every_configuration_of_every_family():
    torch.manual_seed(0)
    inputs = tensors(1, 1, 1, 70, 70, 16, torch.float16)
    for number in range(6):
        check(number, *inputs, None, None, None, None, None, 0.25, True)


def test_refusals_say_what_there_is():
    too_wide = tensors(1, 1, 1, 2, 2, 257)
    with pytest.raises(BackendError, match="257.*1 to 256"):
        flash_attention.attention(runner(), *too_wide, *itertools.repeat(None, 5), 1.0, True)
    odd = tensors(1, 3, 2, 2, 2, 16)
    with pytest.raises(BackendError, match="3 heads are no multiple of 2"):
        flash_attention.attention(runner(), *odd, *itertools.repeat(None, 5), 1.0, True)
