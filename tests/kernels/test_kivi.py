"""KIVI caches in the interpreter: rounded and read as the ops do it, and attention over them where they lie."""

import pytest
import torch
from kernels.interpreted import TOLERANCE, runner

from graphwright import ops
from graphwright.errors import BackendError
from graphwright.kernels.triton import kivi, kivi_attention
from graphwright.kernels.triton.kivi import Side
from graphwright.numerics import relative_error

CALLS = [
    torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [-1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1]]),
    *(torch.tensor([[14 + step], [10 + step]]) for step in range(2)),
    torch.tensor([[16, 17, 18, -1], [-1, -1, -1, -1]]),
]
"""A prompt with padding on either side, steps of which one fills the residual, several tokens, and an ended row."""


def empty(bits: int, group: int, per_channel: bool, dim: int, heads: int = 1) -> list[torch.Tensor]:
    shape = (2, heads, 32 // group, dim) if per_channel else (2, heads, 33, dim // group)
    steps = [torch.zeros(shape, dtype=torch.float16) for _ in range(2)]
    codes = torch.zeros(2, heads, 33, dim * bits // 8, dtype=torch.uint8)
    return [codes, *steps, torch.zeros(2, heads, 9, dim)]


@pytest.mark.parametrize(("bits", "group", "dim"), [(2, 8, 24), (4, 4, 20)])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
def test_tokens_are_rounded_and_read_as_the_ops_do_it(bits, group, dim, per_channel):
    torch.manual_seed(0)
    made, expected = empty(bits, group, per_channel, dim), empty(bits, group, per_channel, dim)
    for number, positions in enumerate(CALLS):
        run = runner(number)
        new = torch.randn(2, positions.shape[1], 1, dim).transpose(1, 2) * torch.logspace(-2, 2, dim)
        new[0, 0, :, :8] = 3.0  # groups without a span
        spans = kivi.token_spans(run, positions)
        side = Side(*made, new, bits, group, per_channel)
        keys, options = int(positions.max()) + 1, (bits, group, per_channel)
        actual = kivi.read(run, side, spans, keys)
        wanted = ops.kivi_read.reference(*expected, new, positions, keys, *options)
        for row, after in enumerate(spans[:, 1].tolist()):
            assert torch.equal(actual[row, :, :after], wanted[row, :, :after])
        kivi.update(run, side, positions, spans)
        ops.kivi_update.reference(*expected, new, positions, *options)
        for part, same in zip(made, expected, strict=True):
            assert torch.equal(part[:, :, :-1], same[:, :, :-1]), "all but the scratch"


@pytest.mark.parametrize(("groups", "bits"), [(1, 2), (3, 2), (8, 4)])
@pytest.mark.parametrize(("before", "length"), [([[530]], 1), ([[41], [6]], 2)], ids=["split", "ragged"])
def test_attention_reads_the_three_places_of_a_token(groups, bits, before, length):
    torch.manual_seed(0)
    dtype = torch.float16 if groups == 3 else torch.float32
    batch, dim, group, window = len(before), 24, 8, 16
    positions = torch.tensor(before) + torch.arange(length)
    keys = int(positions.max()) + 1

    def side(per_channel):
        count = (-(-keys // group), dim) if per_channel else (keys + 1, dim // group)
        codes = torch.randint(0, 256, (batch, 1, keys + 1, dim * bits // 8), dtype=torch.uint8)
        scale, zero = (torch.rand(batch, 1, *count).half() / 2**bits * size for size in (2, -(2**bits)))
        residual = torch.randn(batch, 1, window + 1, dim, dtype=dtype)
        new = torch.randn(batch, 1, length, dim, dtype=dtype)
        return Side(codes, scale, zero, residual, new, bits, group, per_channel)

    def dense(x):
        parts = (x.codes, x.scale, x.zero, x.residual, x.new, positions, keys, bits, group, x.per_channel)
        return ops.kivi_read.reference(*parts).float()

    key, value = side(True), side(False)
    query, at = torch.randn(batch, groups, length, dim, dtype=dtype), torch.arange(keys)[None]
    options = (None, torch.rand(groups), torch.randn(groups), 0.2, True, 0, 0, 0, 5.0)
    run = runner(groups)
    spans = kivi.token_spans(run, positions)
    actual = kivi_attention.attention(run, query, key, value, spans, keys, positions, at, *options)
    expected = ops.attention.reference(query.float(), dense(key), dense(value), positions, at, *options)
    assert relative_error(actual.float(), expected) < TOLERANCE[dtype]


def test_what_is_no_cache_of_kivi_is_refused():
    side = Side(*empty(2, 8, True, 24), torch.zeros(2, 1, 1, 24), 3, 8, True)
    with pytest.raises(BackendError, match="KIVI codes of 3 bits in groups of 8. There are kernels for 2 and 4 bits"):
        kivi.read(runner(), side, torch.zeros(2, 3, dtype=torch.int32), 4)
    codes, *others = empty(2, 8, True, 24, heads=2)
    side = Side(codes.transpose(0, 1), *others, torch.zeros(2, 2, 1, 24), 2, 8, True)
    with pytest.raises(BackendError, match="not contiguous"):
        kivi.read(runner(), side, torch.zeros(2, 3, dtype=torch.int32), 4)
