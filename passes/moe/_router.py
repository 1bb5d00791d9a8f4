"""What a router computes: found by trying every combination of scoring, groups, normalization and capacity on logits.

What a router does is seen as a matrix [tokens, experts] of the weights that it gives, whatever its spelling. It is
looked at on random logits, and on crowds of tokens that all want the same experts, where a capacity shows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import expert_capacity, expert_choice, moe_routing
from graphwright.ops.moe_routing import SCORING
from graphwright.passes.moe._evaluate import Sizes, UnknownError, between, constants, evaluate
from graphwright.program import Program

aten = torch.ops.aten

CROWD = 521
"""Tokens in a crowd, at least; a prime."""

LARGEST_CROWD = 1 << 13
"""A number in the router that is larger may be a capacity that no probe would reach."""


@dataclass(frozen=True)
class Limit:
    """A capacity, as `expert_capacity` takes it; counted for each sequence or over all tokens."""

    capacity: int
    factor: float
    round_up: bool
    each_sequence: bool

    @property
    def arguments(self) -> tuple[int, float, bool]:
        """The last arguments of `expert_capacity` and of `expert_choice`."""
        return self.capacity, self.factor, self.round_up


@dataclass(frozen=True)
class Routing:
    """Arguments of `moe_routing`, and a capacity; or that of `expert_choice`."""

    logits: fx.Node
    correction_bias: fx.Node | None
    top_k: int
    scoring: str = "softmax"
    normalize: bool = False
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    limit: Limit | None = None
    experts_choose: bool = False

    def matrix(self, program: Program, given: Tensor) -> Tensor:
        """The weights [tokens, E] that it gives to logits [..., S, E]."""
        count = given.shape[-1]
        limit = self.limit
        if self.experts_choose and limit is not None:
            rows = given if limit.each_sequence else given.reshape(-1, count)
            return expert_choice.reference(rows, *limit.arguments)[0].reshape(-1, count)
        bias = None if self.correction_bias is None else program.weight(self.correction_bias)
        rest = (self.scoring, self.normalize, self.scaling, self.num_groups, self.top_groups)
        weights, chosen = moe_routing.reference(given, bias, self.top_k, *rest)
        if limit is not None:
            if not limit.each_sequence:
                weights, chosen = (part.reshape(-1, self.top_k) for part in (weights, chosen))
            weights, chosen, _ = expert_capacity.reference(weights, chosen, count, *limit.arguments)
        return dense(weights.reshape(-1, self.top_k), chosen.reshape(-1, self.top_k), count)


Observe = Callable[[Sizes, Tensor], Tensor]
"""The weights [tokens, E] that a router gives, for sizes and logits [..., E] of these sizes."""


@dataclass(frozen=True)
class Probe:
    """Logits, and what the router made of them."""

    given: Tensor
    seen: Tensor

    def agrees(self, matrix: Tensor) -> bool:
        """Whether another matrix is the same."""
        return relative_error(matrix, self.seen) <= EXACT_TOLERANCE[self.given.dtype]


def recognised(program: Program, weights: fx.Node, indices: fx.Node, count: int, generator: torch.Generator) -> Routing:
    """The router behind the weights [tokens, J] and the choices of a layer of `count` experts.

    Raises:
        UnknownError: it is none that is known.
    """
    ends = [weights, indices]
    logits = _logits(ends, count)

    def observe(sizes: Sizes, given: Tensor) -> Tensor:
        bound = sizes.bind(weights, sizes.bind(indices, {logits: given}))
        shares, chosen = evaluate(program, ends, bound)
        return dense(shares, chosen, count)

    top_k = int(indices.meta["val"].shape[1])
    return search(program, logits, ends, [top_k], observe, generator)


def search(
    program: Program,
    logits: fx.Node,
    ends: Sequence[fx.Node],
    top_ks: Iterable[int],
    observe: Observe,
    generator: torch.Generator,
) -> Routing:
    """The router between `logits` and `ends`.

    Raises:
        UnknownError: it is none that is known.
    """
    probes = _probes(logits, ends, observe, generator)
    for routing in _candidates(program, logits, ends, top_ks):
        if all(probe.agrees(routing.matrix(program, probe.given)) for probe in probes):
            return routing
        if not _thinned(program, routing, probes):
            continue
        for limit in _limits(logits, ends, routing.top_k):
            limited = replace(routing, limit=limit)
            if all(probe.agrees(limited.matrix(program, probe.given)) for probe in probes):
                return limited
    for limit in _limits(logits, ends, 1):
        chosen = Routing(logits, None, 1, limit=limit, experts_choose=True)
        if all(probe.agrees(chosen.matrix(program, probe.given)) for probe in probes):
            return chosen
    raise UnknownError("no known scoring, grouping, normalization and capacity gives its weights")


def _probes(logits: fx.Node, ends: Sequence[fx.Node], observe: Observe, generator: torch.Generator) -> list[Probe]:
    value = logits.meta["val"]
    whole = [n for end in ends for n in constants(end, {logits}) if n == int(n)]
    crowd = max(CROWD, 2 * int(max(whole, default=0)) + 1)
    if crowd > LARGEST_CROWD:
        raise UnknownError(f"the number {int(max(whole))} in it may be a capacity, which is too large to be tried")
    probes = []
    # Groups that only seldom change the choice show on many tokens alone.
    for least, few, noise in ((31, 3, 2.0), (crowd, 1, 0.01), (crowd, 2, 0.01)):
        sizes = Sizes(value.shape, least, few)
        given = torch.randn(sizes.shape, generator=generator) * noise
        if noise < 1:
            given += torch.randn(sizes.shape[-1], generator=generator) * 2
        given = given.to(value.dtype)
        probes.append(Probe(given, observe(sizes, given)))
    return probes


def _thinned(program: Program, routing: Routing, probes: list[Probe]) -> bool:
    """Whether the router does what `routing` does, but leaves out some choices."""
    for probe in probes:
        kept = probe.seen != 0
        if not kept.any() or not probe.agrees(routing.matrix(program, probe.given).masked_fill(~kept, 0.0)):
            return False
    return True


def _candidates(program: Program, logits: fx.Node, ends: Sequence[fx.Node], top_ks: Iterable[int]) -> Iterator[Routing]:
    count = int(logits.meta["val"].shape[-1])
    inside = {n for end in ends for n in between(end, {logits})}
    biases = [n for n in inside if n.op == "get_attr" and tuple(n.meta["val"].shape) == (count,)]
    factors = sorted({1.0} | {n for end in ends for n in constants(end, {logits})})
    for top_k, bias, groups, scoring, normalize, scaling in itertools.product(
        top_ks, [None, *biases], _groups(inside, count), SCORING, (False, True), factors
    ):
        if top_k <= count // groups[0] * groups[1]:
            yield Routing(logits, bias, top_k, scoring, normalize, scaling, *groups)


def _limits(logits: fx.Node, ends: Sequence[fx.Node], top_k: int) -> Iterator[Limit]:
    """Capacities that the numbers in a router hint at."""
    numbers = sorted({n for end in ends for n in constants(end, {logits})})
    sequences = (True, False) if logits.meta["val"].dim() > 2 else (False,)
    for each in sequences:
        for number in numbers:
            if number == int(number):
                yield Limit(int(number), 0.0, True, each)
        for factor in sorted({1.0, 1 / top_k, *numbers, *(n / top_k for n in numbers)}):
            for round_up in (True, False):
                yield Limit(0, factor, round_up, each)


def _logits(ends: list[fx.Node], count: int) -> fx.Node:
    """The one linear layer with an output per expert that the routing comes from."""
    found, seen, stack = [], set(), list(ends)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.append(node)
        else:
            stack.extend(node.all_input_nodes)
    if len(found) != 1:
        raise UnknownError(f"it reads {len(found)} linear layers")
    value = found[0].meta["val"]
    if value.shape[-1] != count:
        raise UnknownError(f"its logits are {tuple(value.shape)}, not one per expert and token")
    return found[0]


def _groups(inside: set[fx.Node], count: int) -> list[tuple[int, int]]:
    """Groupings that shapes and top-k calls hint at: (groups, chosen groups)."""
    shapes = [v.shape[-2:] for n in inside if isinstance(v := n.meta.get("val"), Tensor) and v.dim() >= 3]
    numbers = {int(n.args[1]) for n in inside if n.target is aten.topk.default and isinstance(n.args[1], int)}
    sizes = {int(s[0]) for s in shapes if all(isinstance(i, int) for i in s) and math.prod(s) == count and s[0] > 1}
    return [(1, 1), *((size, top) for size in sorted(sizes) for top in sorted(numbers) if top <= size)]


def dense(weights: Tensor, indices: Tensor, count: int) -> Tensor:
    """Weights [T, J] of the experts `indices` as a matrix [T, count]."""
    kept = weights.float().masked_fill(indices < 0, 0.0)
    return torch.zeros(len(weights), count).scatter_add_(1, indices.clamp_min(0), kept)
