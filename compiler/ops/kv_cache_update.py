"""Writing new keys or values into a cache, in place."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op(mutates=("cache",))
def kv_cache_update(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """cache[b, :, slots[b, s]] = new[b, :, s] for every slot that is not negative.

    The last slot of a cache is scratch: a backend may write the entries with a negative slot (padding) there
    instead of skipping them, so nothing may ever read it.

    Args:
        cache: [B, Hkv, C + 1, D], C the capacity; written in place.
        new: [B, Hkv, S, D].
        slots: int64 [B, S], below C; the non-negative slots of one row are distinct.
    """
    capacity = cache.shape[2] - 1
    index = torch.where(slots < 0, capacity, slots)[:, None, :, None].expand_as(new)
    cache.scatter_(2, index, new.to(cache.dtype))


@kv_cache_update.fake
def _fake(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    return None


@kv_cache_update.cost
def _cost(cache: TensorInfo, new: TensorInfo, slots: TensorInfo) -> Cost:
    return Cost(bytes=2 * new.bytes + slots.bytes)


@kv_cache_update.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    cache = torch.zeros(2, 3, 9, 16, dtype=dtype)
    new = torch.randn(2, 3, 4, 16, dtype=dtype)
    yield Sample((cache, new, torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])), note="ragged starts")
    yield Sample((cache, new, torch.tensor([[-1, -1, 0, 1], [7, 0, 1, -1]])), note="padding, wrapping")
    yield Sample((cache, new[:, :, :1], torch.tensor([[5], [0]])), note="one token")
