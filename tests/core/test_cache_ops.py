"""Ops of cache layouts are traced for any number of tokens, which is what lets Inductor compile their references."""

import pytest
import torch
from torch.export import Dim, export

from graphwright import ops

S, B, T = Dim("S", min=1, max=512), Dim("B", min=1, max=64), Dim("T", min=1, max=512)
CAPACITY, GROUPS = Dim("capacity", min=2, max=513), Dim("groups", min=1, max=200)
BLOCKS, TABLE = Dim("blocks", min=2, max=1000), Dim("table", min=1, max=40)

POSITIONS = torch.arange(3, 14).expand(2, -1).contiguous()
AT = {0: B, 1: S}


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def traced(function, arguments, dims) -> None:
    """Exports; raises if a size is specialised."""
    export(Call(function), arguments, dynamic_shapes=(dims,), strict=False)


def new(heads: int = 2) -> torch.Tensor:
    return torch.randn(2, heads, 11, 8)


NEW = {0: B, 2: S}


@pytest.mark.parametrize("per_channel", [True, False])
def test_kivi(per_channel):
    groups = (2, 2, 11, 8) if per_channel else (2, 2, 41, 2)
    scales = [torch.zeros(groups, dtype=torch.float16) for _ in range(2)]
    state = (torch.zeros(2, 2, 41, 2, dtype=torch.uint8), *scales, torch.zeros(2, 2, 9, 8))
    of_groups = {0: B, 2: GROUPS if per_channel else CAPACITY}
    dims = ({0: B, 2: CAPACITY}, of_groups, of_groups, {0: B})
    options = (2, 4, per_channel)
    traced(lambda *a: ops.kivi_update.reference(*a, *options), (*state, new(), POSITIONS), (*dims, NEW, AT))
    read = lambda *a: ops.kivi_read.reference(*a[:-1], a[-1].shape[0], *options)  # noqa: E731
    traced(read, (*state, new(), POSITIONS, torch.arange(17)), (*dims, NEW, AT, {0: T}))


def test_evicting():
    caches = (torch.zeros(2, 2, 13, 8), torch.zeros(2, 2, 13, 8))
    held = (torch.zeros(2, 2, 12, dtype=torch.int64), torch.zeros(2, 2, 12))

    def step(key_cache, value_cache, held, score, query, key, value, positions):
        places = torch.cat([held - 1, positions[:, None].expand(-1, 2, -1)], 2)
        keys, values = (torch.cat([c[:, :, :12], n], 2) for c, n in ((key_cache, key), (value_cache, value)))
        out, mass = ops.attention_with_mass.reference(
            query, keys, values, positions, places, None, None, 0.3, 0.0, True, 5
        )
        ops.evicting_update.reference(key_cache, value_cache, held, score, key, value, positions, mass, 3, 4, 5, False)
        return out

    traced(step, (*caches, *held, new(4), new(), new(), POSITIONS), ({0: B},) * 4 + (NEW, NEW, NEW, AT))


def test_streaming():
    def step(query, key_cache, value_cache, key, value, positions, inv_freq):
        slots = ops.streaming_slots.reference(positions, 2, 10)
        tensors = (query, key_cache, value_cache, key, value, positions, inv_freq)
        return slots, ops.streaming_attention.reference(*tensors, None, 0.3, 2, 10)

    caches = (torch.zeros(2, 2, 13, 8), torch.zeros(2, 2, 13, 8))
    traced(step, (new(4), *caches, new(), new(), POSITIONS, torch.ones(4)), (NEW, {0: B}, {0: B}, NEW, NEW, AT, {}))


def test_paged():
    pool, table = torch.randn(9, 2, 4, 8), torch.arange(8).reshape(2, 4)
    read = lambda pool, table, keys: ops.paged_read.reference(pool, table, keys.shape[0])  # noqa: E731
    traced(read, (pool, table, torch.arange(13)), ({0: BLOCKS}, {0: B, 1: TABLE}, {0: T}))
    traced(ops.paged_update.reference, (pool, new(), POSITIONS, table), ({0: BLOCKS}, NEW, AT, {0: B, 1: TABLE}))


def test_kvquant():
    codebook = torch.linspace(-1, 1, 8)
    for tables in ((torch.zeros(16), torch.ones(16)), (None, None)):
        encode = lambda x, tables=tables: ops.kvquant_encode.reference(x, *tables, codebook, 2, 3)  # noqa: E731
        traced(encode, (new(),), (NEW,))
