"""The arithmetic of merging key-value heads: which heads, in which basis, into what.

Weights are float64 and carry their bias as a last column where there is one; inputs are then [x, 1] and `gram` is the
sum of their outer products. Heads of one group stand next to each other: see `HeadWeights.reordered`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphwright.heads import Basis

ALIGNMENT_TURNS = 10
"""Alternations between the mean of a group and the rotations of its heads."""


@dataclass(frozen=True)
class HeadWeights:
    """What one attention computes with.

    Attributes:
        query: [H, D, K], rows of the projection.
        key: [Hkv, D, K].
        value: [Hkv, Dv, K].
        out: [H, Dv, N], columns of the output projection.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor

    @property
    def share(self) -> int:
        """Query heads per key-value head."""
        return len(self.query) // len(self.key)

    def reordered(self, order: Tensor) -> "HeadWeights":
        """The same attention with its key-value heads, and the query heads that read them, in another order."""
        readers = spread(order, self.share)
        return HeadWeights(self.query[readers], self.key[order], self.value[order], self.out[readers])


def spread(order: Tensor, share: int) -> Tensor:
    """The order [H] of query heads that goes with an order [Hkv] of key-value heads."""
    return (order[:, None] * share + torch.arange(share)).flatten()


def averaged(heads: HeadWeights, groups: int) -> HeadWeights:
    """Mean key and value of each group of neighbours (Ainslie et al. 2023)."""
    key, value = (part.unflatten(0, (groups, -1)).mean(1) for part in (heads.key, heads.value))
    return replace(heads, key=key, value=value)


def similar(distance: Tensor, groups: int) -> Tensor:
    """An order [Hkv] in which each group's heads are near to each other.

    Pairs of heads are swapped between groups while that lowers the sum of distances within groups, from neighbours as
    they stand: so the result is never worse than leaving them there.

    Args:
        distance: [Hkv, Hkv], squared, symmetric.
        groups: of equal size.
    """
    order = torch.arange(len(distance)).view(groups, -1)

    def gain(a: int, i: int, b: int, j: int) -> float:
        one, other = order[a], order[b]
        first, second = int(one[i]), int(other[j])
        rest_a, rest_b = one[one != first], other[other != second]
        before = distance[first, rest_a].sum() + distance[second, rest_b].sum()
        return float(before - distance[second, rest_a].sum() - distance[first, rest_b].sum())

    swaps = [
        (a, i, b, j)
        for a in range(groups) for b in range(a + 1, groups)
        for i in range(order.shape[1]) for j in range(order.shape[1])
    ]  # fmt: skip
    scale = float(distance.sum()) + 1e-30
    while swaps:
        best = max(swaps, key=lambda swap: gain(*swap))
        if gain(*best) <= 1e-9 * scale:
            break
        a, i, b, j = best
        order[a, i], order[b, j] = order[b, j].clone(), order[a, i].clone()
    return order.sort(1)[0].flatten()


def distances(heads: Tensor, align: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Squared distances [n, n] between heads [n, D, K], relative to their mean size, after alignment if given."""
    count = len(heads)
    result = heads.new_zeros(count, count)
    for i in range(count):
        for j in range(i):
            other = heads[j] if align is None else align(heads[j], heads[i])
            result[i, j] = result[j, i] = (heads[i] - other).square().sum()
    return result / heads.square().sum().clamp(min=1e-30)


def root(gram: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix [..., m, m]."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mH


def turn_to(head: Tensor, goal: Tensor) -> Tensor:
    """The orthogonal matrix [D, D] that brings a head [D, K] nearest to another (orthogonal Procrustes)."""
    left, _, right = torch.linalg.svd(goal @ head.mH)
    return left @ right


def key_turn(head: Tensor, goal: Tensor, basis: Basis) -> Tensor:
    """As `turn_to`, of the rotations that leave scores what they are: of rope's pairs, and among free channels."""
    turn = torch.eye(len(head), dtype=head.dtype)
    if len(basis.pairs):
        overlap = (paired(goal, basis) * paired(head, basis).conj()).sum(-1)
        phase = torch.where(overlap.abs() > 0, overlap / overlap.abs().clamp(min=1e-300), torch.ones_like(overlap))
        first, second = basis.pairs.unbind(1)
        turn[first, first], turn[second, second] = phase.real, phase.real
        turn[first, second], turn[second, first] = -phase.imag, phase.imag
    if len(basis.free):
        turn[basis.free[:, None], basis.free] = turn_to(head[basis.free], goal[basis.free])
    return turn


def paired(head: Tensor, basis: Basis) -> Tensor:
    """The channels that rope turns as complex numbers: [..., D, K] becomes [..., F, K]."""
    return torch.complex(head[..., basis.pairs[:, 0], :], head[..., basis.pairs[:, 1], :])


def aligned(heads: HeadWeights, groups: int, basis: Basis, gram: Tensor, *, values: bool) -> HeadWeights:
    """Turns the heads of each group towards each other, with their readers: the function stays what it was.

    Args:
        heads: in order of groups.
        groups: of equal size.
        basis: what keys may be turned by.
        gram: [K, K] of the inputs, in whose metric heads are compared.
        values: whether values may be turned.
    """
    metric, share = root(gram), heads.share
    key, value, query, out = heads.key.clone(), heads.value.clone(), heads.query.clone(), heads.out.clone()
    size = len(key) // groups
    for start in range(0, len(key), size):
        members = range(start, start + size)
        turns = turned_together(heads.key[start : start + size] @ metric, lambda h, g: key_turn(h, g, basis))
        for member, turn in zip(members, turns, strict=True):
            key[member] = turn @ key[member]
            query[member * share : (member + 1) * share] = turn @ query[member * share : (member + 1) * share]
        if values:
            turns = turned_together(heads.value[start : start + size] @ metric, turn_to)
            for member, turn in zip(members, turns, strict=True):
                value[member] = turn @ value[member]
                out[member * share : (member + 1) * share] = turn @ out[member * share : (member + 1) * share]
    return HeadWeights(query, key, value, out)


def turned_together(heads: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """A rotation for each head [n, D, K] that brings all near to their common mean (generalized Procrustes).

    It starts from each of the heads and keeps what ends nearest, as alternation finds a local optimum only.
    """
    best: tuple[float, list[Tensor]] | None = None
    for goal in heads:
        for _ in range(ALIGNMENT_TURNS):
            turns = [turn(head, goal) for head in heads]
            moved = torch.stack([one @ head for one, head in zip(turns, heads, strict=True)])
            goal = moved.mean(0)
        spread_out = float((moved - goal).square().sum())
        if best is None or spread_out < best[0]:
            best = spread_out, turns
    return best[1] if best else []


def subspace(gram: Tensor, readers: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What to keep of several heads at once so that their readers see least of the loss.

    For channels z with second moments `gram`, read by r with second moments `readers`, minimizes the expected
    |r (z - decode encode z)|^2: a reduced-rank regression (Izenman 1975), solved by one eigenvalue problem.

    Args:
        gram: [..., m, m], positive semi-definite, real or complex.
        readers: [..., m, m], as `gram`.
        rank: channels to keep.

    Returns:
        encode [..., rank, m] with orthonormal rows, decode [..., m, rank].
    """
    half = root(gram)
    vectors = torch.linalg.eigh(half @ readers @ half)[1][..., -rank:]
    inverse = torch.linalg.pinv(half, hermitian=True, rtol=1e-7)
    rows, scale = torch.linalg.qr((vectors.mH @ inverse).mH)
    return rows.mH, half @ vectors @ scale.mH


def joined(heads: HeadWeights, groups: int, basis: Basis, gram: Tensor, *, values: bool) -> HeadWeights:
    """One head for each group that spans what its readers need most, and readers that say how they read it.

    Keys are one such problem for each of rope's pairs, as complex numbers, and one for all free channels; fixed
    channels are averaged. Queries are the readers of keys, the output projection is the reader of values.
    """
    mean, share = averaged(heads, groups), heads.share
    key, value = mean.key.clone(), mean.value.clone()
    query, out = heads.query.clone(), heads.out.clone()
    size = len(heads.key) // groups
    for group in range(groups):
        kv, readers = slice(group * size, (group + 1) * size), slice(group * size * share, (group + 1) * size * share)
        keys, queries = heads.key[kv], heads.query[readers]
        if len(basis.pairs):
            merged, read = _one_subspace(
                paired(keys, basis).movedim(1, 0)[:, :, None],
                paired(queries, basis).movedim(1, 0)[:, :, None],
                gram,
                gram,
            )
            _store(key[group], merged[:, 0], basis)
            _store(query[readers], read[:, :, 0].movedim(0, 1), basis)
        if len(basis.free):
            merged, read = _one_subspace(keys[:, basis.free], queries[:, basis.free], gram, gram)
            key[group][basis.free] = merged
            query[readers.start : readers.stop, basis.free] = read
        if values:
            merged, read = _one_subspace(heads.value[kv], heads.out[readers], gram, None)
            value[group], out[readers] = merged, read
    return HeadWeights(query, key, value, out)


def _one_subspace(made: Tensor, read: Tensor, gram: Tensor, reader_gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Heads [..., n, D, K] as one [..., D, K], and their readers [..., n * share, D, N] as they read that one."""
    *batch, count, width, _ = made.shape
    channels = made.flatten(-3, -2)
    measured = gram.to(made.dtype)
    by_head = read.unflatten(-3, (count, -1))
    weighted = by_head if reader_gram is None else by_head @ reader_gram.to(made.dtype)
    blocks = (weighted @ by_head.mH).sum(-3)
    readers = made.new_zeros(*batch, count * width, count * width)
    for head in range(count):
        at = slice(head * width, (head + 1) * width)
        readers[..., at, at] = blocks[..., head, :, :]
    encode, decode = subspace(channels @ measured @ channels.mH, readers, width)
    parts = decode.unflatten(-2, (count, width)).mH
    return encode @ channels, (parts[..., :, None, :, :] @ by_head).flatten(-4, -3)


def _store(target: Tensor, values: Tensor, basis: Basis) -> None:
    """Writes complex channels [..., F, K] back into heads [..., D, K]."""
    target[..., basis.pairs[:, 0], :] = values.real
    target[..., basis.pairs[:, 1], :] = values.imag
