"""A cache in blocks that lie anywhere in a pool, found through a table (PagedAttention).

Kwon et al. 2023, arXiv:2309.06180. Slot t of row b lies in block table[b, t // block_size] of the pool.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op(mutates=("pool",))
def paged_update(pool: Tensor, new: Tensor, slots: Tensor, table: Tensor) -> None:
    """`kv_cache_update` through a block table.

    Args:
        pool: [N, Hkv, block_size, D]; the last block is scratch.
        new: [B, Hkv, S, D].
        slots: int64 [B, S], negative for padding; the non-negative ones of a row are distinct, and their blocks are
            no other row's.
        table: int64 [B, M], blocks of each row; what is not in use is negative.
    """
    size, scratch = pool.shape[2], pool.shape[0] - 1
    number = (slots // size).clamp(0, table.shape[1] - 1)
    blocks = torch.where(slots < 0, scratch, table.gather(1, number))
    heads = torch.arange(pool.shape[1], device=pool.device)[None, None]
    # A negative block would wrap around; it can only come from a table without room, and goes to scratch.
    safe = torch.where(blocks < 0, scratch, blocks)[:, :, None]
    pool.index_put_((safe, heads, (slots % size)[:, :, None]), new.transpose(1, 2).to(pool.dtype))


@op
def paged_read(pool: Tensor, table: Tensor, keys: int) -> Tensor:
    """The first `keys` slots of every row, [B, Hkv, keys, D]; blocks that are not in use hold anything."""
    size = pool.shape[2]
    slots, heads = torch.arange(keys, device=pool.device), torch.arange(pool.shape[1], device=pool.device)
    blocks = table[:, slots // size].clamp(min=0)
    return pool[blocks[:, :, None], heads, (slots % size)[:, None]].transpose(1, 2).contiguous()


@paged_update.fake
def _fake(pool: Tensor, new: Tensor, slots: Tensor, table: Tensor) -> None:
    return None


@paged_read.fake
def _read_fake(pool: Tensor, table: Tensor, keys: int) -> Tensor:
    return pool.new_empty((table.shape[0], pool.shape[1], keys, pool.shape[3]))


@paged_update.cost
def _cost(pool: TensorInfo, new: TensorInfo, slots: TensorInfo, table: TensorInfo) -> Cost:
    return Cost(bytes=2 * new.bytes + slots.bytes + table.bytes)


@paged_read.cost
def _read_cost(pool: TensorInfo, table: TensorInfo, keys: object) -> Cost:
    return Cost(bytes=2 * table.numel * pool.shape[1] * pool.shape[2] * pool.shape[3] * pool.dtype.itemsize)


@paged_update.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    table = torch.tensor([[4, 0, 2], [1, 3, -1]])
    slots = torch.tensor([[0, 1, 4, 9], [-1, 2, 3, 7]])
    yield Sample((torch.zeros(6, 2, 4, 8, dtype=dtype), torch.randn(2, 2, 4, 8, dtype=dtype), slots, table))


@paged_read.samples
def _read_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for keys in (1, 4, 9):
        yield Sample((torch.randn(6, 2, 4, 8, dtype=dtype), torch.tensor([[4, 0, 2], [1, 3, -1]]), keys))
