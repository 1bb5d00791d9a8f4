"""Loops over experts that torch.export cannot follow, put as sorted products for the time of a capture.

    for expert in hit:                                  ids, order = sort(indices)
        rows = where(indices == expert)        →        h = grouped_linear(x[order // k], up, ends)
        y.index_add_(0, rows, mlp(x[rows]) * w)         y = sum over choices of grouped_linear(act(h), down, ends) * w

A loop is recognised by the tensors and layers that its module holds, and by what the module computes: the replacement
is taken only where it gives the module's own outputs on random tokens, and on many equal ones, which an expert of
limited capacity does not all take. Two forms are known: a module of stacked weights [E, …] called with tokens, indices
and weights (transformers' eager experts), and a block with a linear router and a list of expert MLPs, such as
Switch's, whose experts may have a capacity.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import expert_capacity, experts, grouped_linear, moe_routing
from graphwright.ops.experts import CLAMPED_SWIGLU, activate
from graphwright.ops.gated_activation import ACTIVATIONS
from graphwright.ops.moe_routing import SCORING

EQUAL_TOKENS = 521
"""Equal tokens that a loop must not drop any of, unless its experts have a capacity. A prime: no whole shares."""

SMALL_COUNT, SMALL_WIDTH = 4, 8
"""Experts, and the unit of widths, of a copy on which a module of stacked weights is recognised."""

LARGEST_CROWD = 1 << 13
"""A capacity that would take more equal tokens to be seen is not looked for."""


@dataclass(frozen=True)
class _Mlp:
    """Weights [E, N, K] of all experts, the gate's rows first, and what stands between the products."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str
    gated: bool
    interleaved: bool
    alpha: float = 1.0
    limit: float = 0.0
    flipped: bool = False
    """Both weights are stored as [E, K, N]."""

    def __call__(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        count, top_k = self.up.shape[0], indices.shape[1]
        up, down = (w if self.flipped else w.transpose(1, 2) for w in (self.up, self.down))
        ids, order = indices.reshape(-1).sort()
        ends = torch.histc(ids.float(), count, 0, count - 1).cumsum(0, dtype=torch.int32)
        inner = grouped_linear(x[order // top_k], up, ends)
        inner = inner if self.up_bias is None else inner + self.up_bias[ids]
        if self.interleaved:
            inner = torch.cat([inner[:, ::2], inner[:, 1::2]], -1)
        inner = activate(inner, self.activation, self.gated, self.alpha, self.limit)
        outer = grouped_linear(inner, down, ends)
        outer = outer if self.down_bias is None else outer + self.down_bias[ids]
        outer = outer * weights.reshape(-1)[order].unsqueeze(-1)
        places = torch.empty_like(order).index_put((order,), torch.arange(order.shape[0], device=order.device))
        return outer[places].reshape(-1, top_k, outer.shape[1]).sum(1).to(x.dtype)

    def limited(self, x: Tensor, weights: Tensor, indices: Tensor, limit: "_Limit", shape: torch.Size) -> Tensor:
        """The same for tokens in sequences of `shape`, where experts take no more than their capacity."""
        *capacity, each = limit
        if each:
            weights, indices = (part.reshape(*shape, part.shape[-1]) for part in (weights, indices))
        weights, indices, _ = expert_capacity(weights, indices, self.up.shape[0], *capacity)
        weights, indices = (part.reshape(-1, part.shape[-1]) for part in (weights, indices))
        stored = (self.up, self.up_bias, self.down, self.down_bias)
        return experts(x, weights, indices, *stored, self.activation, self.gated)


@contextmanager
def unrolled(model: nn.Module, stacked: bool) -> Iterator[list[str]]:
    """Replaces the forward of every loop that is recognised; yields their names, and puts all back at the end.

    Args:
        model: what is to be captured.
        stacked: replace modules of stacked weights too; not all of them are loops.
    """
    changed: list[tuple[nn.Module, list[str]]] = []
    names: list[str] = []
    try:
        with torch.no_grad():
            for name, module in list(model.named_modules()):
                if any(name.startswith(f"{done}.") for done in names):
                    continue
                made = (_stacked(module) if stacked else None) or _listed(module)
                if made is None:
                    continue
                forward, tensors = _as_called(module, made[0]), made[1]
                for key, tensor in tensors.items():
                    module.register_buffer(key, tensor, persistent=False)
                module.forward = forward
                changed.append((module, list(tensors)))
                names.append(name)
        yield names
    finally:
        for module, keys in changed:
            del module.forward
            for key in keys:
                delattr(module, key)


def _as_called(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of the tensors in the order of the module's own parameters, however a caller names them."""
    signature = inspect.signature(module.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*signature.bind(*args, **kwargs).arguments.values())

    forward.__signature__ = signature  # export names inputs by it
    return forward


# A module of stacked weights


@dataclass(frozen=True)
class StackedExperts:
    """What a module of two stacks of weights computes: the MLP of `graphwright.ops.experts`.

    Attributes:
        up: name of the parameter [E, 2F, K], or [E, F, K] where not `gated`; the gate's rows first.
        down: name of the parameter [E, N, F].
        activation: as `experts` takes it, like the rest.
        gated: whether the first product has a gate.
        alpha: of a clamped gate.
        limit: of a clamped gate.
        order: the places of tokens, choices and shares among the arguments of its forward.
    """

    up: str
    down: str
    activation: str
    gated: bool
    alpha: float
    limit: float
    order: tuple[int, ...]


def stacked_experts(module: nn.Module) -> StackedExperts | None:
    """The meaning of a module of stacked weights without biases; None if it computes something else.

    It is found on a small copy with random weights, so the module's own may lie on the meta device.
    """
    if not all(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
        return None
    small = _small_copy(module)
    with torch.no_grad():
        found = _read_stack(small)
    if found is None or found[0].flipped or found[0].interleaved:
        return None
    mlp, order = found
    names = {id(parameter): name for name, parameter in small.named_parameters(recurse=False)}
    middle = (mlp.activation, mlp.gated, mlp.alpha, mlp.limit)
    return StackedExperts(names[id(mlp.up)], names[id(mlp.down)], *middle, order)


def _small_copy(module: nn.Module) -> nn.Module:
    """The module with few experts and short rows: every width is divided by what divides them all."""
    own = dict(module.named_parameters(recurse=False))
    counts = {int(parameter.shape[0]) for parameter in own.values()}
    widths = {int(size) for parameter in own.values() for size in parameter.shape[1:]}
    divisor = math.gcd(*widths)
    smaller = {width: width // divisor * SMALL_WIDTH for width in widths}
    known = smaller | dict.fromkeys(counts, SMALL_COUNT)
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    vars(small).update({name: known.get(value, value) for name, value in vars(module).items() if type(value) is int})
    small._parameters = {}
    for name, parameter in own.items():
        shape = (SMALL_COUNT, *(smaller[int(size)] for size in parameter.shape[1:]))
        small._parameters[name] = nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
    return small


def _stacked(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]] | None:
    found = _read_stack(module)
    return None if found is None else (_stack_forward(*found), {})


def _read_stack(module: nn.Module) -> tuple[_Mlp, tuple[int, ...]] | None:
    """The MLP of a module of stacked weights, and where its forward takes tokens, choices and shares."""
    own = dict(module.named_parameters(recurse=False))
    stacks = {name: p for name, p in own.items() if p.dim() == 3}
    biases = {name: p for name, p in own.items() if p.dim() == 2}
    if len(stacks) != 2 or len(own) != len(stacks) + len(biases) or len({p.shape[0] for p in own.values()}) != 1:
        return None
    count = next(iter(stacks.values())).shape[0]
    numbers = {float(v) for v in vars(module).values() if type(v) is float and v > 0}
    for (first, up), (second, down) in itertools.permutations(stacks.items()):
        for flip in (False, True):
            wide, narrow = (t.transpose(1, 2) if flip else t for t in (up, down))
            bias = [_bias(biases, count, t.shape[1], stack) for t, stack in ((wide, first), (narrow, second))]
            if sum(b is not None for b in bias) != len(biases) or wide.shape[2] != narrow.shape[1]:
                continue
            for kind in _middles(wide.shape[1], narrow.shape[2], numbers):
                mlp = replace(_Mlp(up, bias[0], down, bias[1], *kind), flipped=flip)
                for order in ((0, 1, 2), (0, 2, 1)):
                    if _same_stack(module, mlp, order):
                        return mlp, order
    return None


def _bias(biases: dict[str, nn.Parameter], count: int, outputs: int, stack: str) -> Tensor | None:
    fitting = [n for n, b in biases.items() if tuple(b.shape) == (count, outputs)]
    named = [n for n in fitting if n.startswith(stack)] or fitting
    return biases[named[0]] if named else None


def _middles(wide: int, inner: int, numbers: set[float]) -> Iterator[tuple[Any, ...]]:
    """(activation, gated, interleaved, alpha, limit) that fit the widths."""
    if wide == 2 * inner:
        for name, interleaved in itertools.product(ACTIVATIONS, (False, True)):
            yield name, True, interleaved
        for alpha, limit, interleaved in itertools.product(numbers, numbers, (True, False)):
            yield CLAMPED_SWIGLU, True, interleaved, alpha, limit
    elif wide == inner:
        for name in ACTIVATIONS:
            yield name, False, False


def _stack_forward(mlp: _Mlp, order: tuple[int, ...]) -> Callable[..., Tensor]:
    def forward(*given: Tensor) -> Tensor:
        x, indices, weights = (given[place] for place in order)
        return mlp(x, weights, indices)

    return forward


def _same_stack(module: nn.Module, mlp: _Mlp, order: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    count, width = mlp.up.shape[0], mlp.up.shape[1 if mlp.flipped else 2]
    for top_k in {1, min(2, count)}:
        x = torch.randn(23, width, generator=generator).to(mlp.up.dtype)
        indices = torch.rand(23, count, generator=generator).argsort(-1)[:, :top_k]
        weights = torch.rand(23, top_k, generator=generator).to(mlp.up.dtype)
        given = [x, indices, weights]
        if not _agrees(module, [given[order.index(place)] for place in range(3)], mlp(x, weights, indices)):
            return False
    return True


# A block with a router and a list of experts


def _listed(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]] | None:
    lists = [c for c in module.children() if isinstance(c, (nn.ModuleList, nn.ModuleDict)) and len(c) > 1]
    if len(lists) != 1:
        return None
    members = list(lists[0].values() if isinstance(lists[0], nn.ModuleDict) else lists[0])
    inside = set(lists[0].modules())
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part not in inside]
    routers = [part for part in linears if part.out_features == len(members)]
    owned = [[part for part in member.modules() if isinstance(part, nn.Linear)] for member in members]
    if len(routers) != 1 or any(len(own) != len(owned[0]) or len(own) not in (2, 3) for own in owned):
        return None
    held = set(itertools.chain(*(m.parameters() for m in (lists[0], routers[0]))))
    if any(p not in held for p in module.parameters()):
        return None
    mlp = _member_mlp(members, owned)
    forward = None if mlp is None else _routed_block(module, inside, routers[0], mlp)
    if mlp is None or forward is None:
        return None
    tensors = {"experts_up": mlp.up, "experts_down": mlp.down}
    biases = {"experts_up_bias": mlp.up_bias, "experts_down_bias": mlp.down_bias}
    return forward, {**tensors, **{n: b for n, b in biases.items() if b is not None}}


def _routed_block(module: nn.Module, inside: set[nn.Module], router: nn.Linear, mlp: _Mlp) -> Callable[..., Any] | None:
    """A block's forward with its routing, found by comparing with the block; None if it is none that is known."""
    parts = [part for part in module.modules() if part not in inside and part is not router]
    held = [(name, value) for part in parts for name, value in vars(part).items() if type(value) in (int, float)]
    numbers = sorted({value for _, value in held if value > 0})
    crowd = max([EQUAL_TOKENS, *(2 * int(value) for name, value in held if "capacity" in name)])
    if crowd > LARGEST_CROWD:
        return None
    top_ks = sorted({1} | {int(n) for n in numbers if n == int(n) and n <= router.out_features})
    limits: list[_Limit | None] = [None, *_limits(numbers)]
    for limit, top_k, scoring, normalize in itertools.product(limits, top_ks, SCORING, (False, True)):
        forward = _block_forward(module, router, mlp, (top_k, scoring, normalize), limit)
        if _same_block(module, forward, router.weight, crowd, limit is not None):
            return forward
    return None


_Limit = tuple[int, float, bool, bool]
"""Capacity, factor and rounding of `expert_capacity`, and whether each sequence is counted by itself."""


def _limits(numbers: list[int | float]) -> Iterator[_Limit]:
    """Capacities that the numbers of a module may mean."""
    for number, each in itertools.product(numbers, (True, False)):
        if number == int(number):
            yield int(number), 0.0, True, each
    for number, up, each in itertools.product(numbers, (True, False), (True, False)):
        yield 0, float(number), up, each


def _member_mlp(members: list[nn.Module], linears: list[list[nn.Linear]]) -> _Mlp | None:
    """The experts' weights stacked, if every expert is the same known MLP."""
    x = torch.randn(7, linears[0][0].in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(linears[0][0].weight.dtype)
    for order in itertools.permutations(range(len(linears[0]))):
        *into, last = order
        shapes = [[tuple(own[i].weight.shape) for i in order] for own in linears]
        gates = {shape for own in shapes for shape in own[:-1]}
        downs = {own[-1] for own in shapes}
        if len(gates) != 1 or len(downs) != 1:
            continue
        (inner, width), (_, read) = gates.pop(), downs.pop()
        if width != x.shape[1] or read != inner:
            continue
        stacks = [_stack(linears, into, "weight"), _stack(linears, into, "bias")]
        ends = [_stack(linears, [last], "weight"), _stack(linears, [last], "bias")]
        for kind in _middles(len(into) * inner, inner, set()):
            if kind[2] or stacks[0] is None or ends[0] is None:
                continue
            mlp = _Mlp(stacks[0], stacks[1], ends[0], ends[1], *kind)
            one = torch.ones(7, 1, dtype=x.dtype)
            ids = [torch.full((7, 1), i) for i in range(len(members))]
            pairs = zip(members, ids, strict=True)
            if all(_agrees(m, [x], mlp(x, one, i)) for m, i in pairs):
                return mlp
    return None


def _stack(linears: list[list[nn.Linear]], places: list[int], name: str) -> Tensor | None:
    """Parameters [E, …] of the layers at `places`, below each other; None if there are none."""
    parts = [[getattr(own[place], name) for place in places] for own in linears]
    if any(part is None for own in parts for part in own):
        return None
    return torch.stack([torch.cat([p.detach() for p in own]) for own in parts])


def _block_forward(
    module: nn.Module, router: nn.Linear, mlp: _Mlp, routing: tuple[Any, ...], limit: _Limit | None
) -> Callable[..., Any]:
    top_k, scoring, normalize = routing

    def forward(hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, indices = moe_routing(router(x), None, top_k, scoring, normalize)
        # The buffers are there while the loop is replaced, so that the program's weights get names.
        stored = _Mlp(
            getattr(module, "experts_up", mlp.up),
            getattr(module, "experts_up_bias", mlp.up_bias),
            getattr(module, "experts_down", mlp.down),
            getattr(module, "experts_down_bias", mlp.down_bias),
            mlp.activation, mlp.gated, mlp.interleaved,
        )  # fmt: skip
        if limit is None:
            result = stored(x, weights.to(x.dtype), indices)
        else:
            result = stored.limited(x, weights, indices, limit, hidden.shape[:-1])
        return result.reshape(*hidden.shape[:-1], mlp.down.shape[1])

    return forward


def _same_block(module: nn.Module, forward: Callable[..., Any], weight: Tensor, crowd: int, limited: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    several = torch.randn(2, 19, weight.shape[1], generator=generator).to(weight.dtype)
    given = [several, *(several[:1, :1].expand(n, crowd, -1).contiguous() for n in ((1, 2) if limited else (1,)))]
    for each in given:
        # Blocks take tokens of several sequences, or else of one.
        x = each if _output(module, [each]) is not None else each[0]
        if not _agrees(module, [x], forward(x)):
            return False
    return True


def _agrees(module: nn.Module, given: list[Tensor], expected: Tensor) -> bool:
    """Whether a module gives a tensor."""
    found = _output(module, given)
    if found is None or found.shape != expected.shape:
        return False
    return relative_error(found, expected) <= EXACT_TOLERANCE[expected.dtype]


def _output(module: nn.Module, given: list[Tensor]) -> Tensor | None:
    """What a module gives; one that does not take the arguments, or gives no tensor, is another kind of module."""
    try:
        found = module(*given)
    except (TypeError, ValueError, IndexError, RuntimeError):
        return None
    return found if isinstance(found, Tensor) else None
