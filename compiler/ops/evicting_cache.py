"""A cache of a fixed number of tokens per head: when it is full, those with the least merit make room."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op(mutates=("key_cache", "value_cache", "held", "score"))
def evicting_update(
    key_cache: Tensor,
    value_cache: Tensor,
    held: Tensor,
    score: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mass: Tensor,
    recent: int,
    drop: int,
    history: int,
    highest: bool,
) -> None:
    """Adds `mass` to the scores, takes the new tokens in, and evicts what does not fit.

    Kept are the `recent` newest tokens, then those with the best score, the newer of two equal ones.

    Args:
        key_cache: [B, Hkv, C + 1, D]; the last slot is scratch.
        value_cache: [B, Hkv, C + 1, Dv].
        held: int64 [B, Hkv, C], the position in each slot plus one; 0 for an empty slot.
        score: float32 [B, Hkv, C].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        positions: int64 [B, S]; -1 for padding.
        mass: float32 [B, Hkv, C + S], of the slots and then of the new tokens.
        recent: newest tokens that stay in any case, below C - drop.
        drop: free slots after an eviction; 0 to evict one by one.
        history: if not 0, mass counts only while less than so many slots are free, and scores start anew after an
            eviction.
        highest: the best score is the highest, else the lowest.
    """
    capacity, heads = held.shape[2], held.shape[1]
    places = torch.cat([held - 1, positions[:, None].expand(-1, heads, -1)], 2)
    valid = places >= 0
    count = valid.sum(2, keepdim=True)
    gained = mass * (count > capacity - history) if history else mass
    total = torch.cat([score, torch.zeros_like(mass[:, :, capacity:])], 2) + gained
    full = count > capacity
    room = torch.where(full, capacity - drop, capacity)
    newest = places.amax(2, keepdim=True)
    merit = torch.where(places > newest - recent, float("inf"), total if highest else -total)
    order = _order(places, torch.where(valid, merit, float("-inf")))
    ranked = torch.arange(order.shape[2], device=held.device).expand_as(order)
    keep = torch.zeros_like(order).scatter(2, order, ranked) < room
    keep = keep & valid
    if history:
        total = torch.where(full, 0.0, total)
    slots = _free_slots(keep, capacity)
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache.scatter_(2, slots[..., None].expand(-1, -1, -1, new.shape[3]), new.to(cache.dtype))
    old = keep[:, :, :capacity]
    for state, fresh in ((held, places + 1), (score, total)):
        kept = torch.where(old, fresh[:, :, :capacity], 0)
        state.copy_(torch.cat([kept, kept[:, :, :1]], 2).scatter(2, slots, fresh[:, :, capacity:])[:, :, :capacity])


def _order(places: Tensor, merit: Tensor) -> Tensor:
    """Indices by falling merit, and by falling place where that is equal."""
    newest = places.argsort(stable=True, dim=2, descending=True)
    return newest.gather(2, merit.gather(2, newest).argsort(stable=True, dim=2, descending=True))


def _free_slots(keep: Tensor, capacity: int) -> Tensor:
    """The slot of each new token, [B, Hkv, S]; `capacity` for those that are not kept."""
    old, new = keep[:, :, :capacity], keep[:, :, capacity:]
    free = old.int().argsort(stable=True, dim=2)
    number = (new.cumsum(2) - 1).clamp(0, capacity - 1)
    return torch.where(new, free.gather(2, number), capacity)


@evicting_update.fake
def _fake(key_cache: Tensor, *_rest: object, **_more: object) -> None:
    return None


@evicting_update.cost
def _cost(
    key_cache: TensorInfo, value_cache: TensorInfo, held: TensorInfo, score: TensorInfo, key: TensorInfo, *_rest: object
) -> Cost:
    return Cost(flops=8 * held.numel, bytes=2 * held.bytes + 2 * score.bytes + 4 * key.bytes)


@evicting_update.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for drop, history, highest in ((0, 0, True), (2, 3, False)):
        caches = [torch.zeros(2, 2, 7, 4, dtype=dtype) for _ in range(2)]
        held, score = torch.zeros(2, 2, 6, dtype=torch.int64), torch.zeros(2, 2, 6)
        new = [torch.randn(2, 2, 8, 4, dtype=dtype) for _ in range(2)]
        positions = torch.stack([torch.arange(8), torch.arange(8) - 3]).clamp(min=-1)
        mass = torch.rand(2, 2, 14)
        yield Sample((*caches, held, score, *new, positions, mass, 2, drop, history, highest), note=f"drop {drop}")
