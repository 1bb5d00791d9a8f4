"""Mixtures of experts whose stacked weights are multiplied whole, as einsum writes them.

    dispatch [T, E, C], inputs [E, C, K]     each expert's tokens, put into places of fixed number (GShard)
    y = sum over e of gates[t, e] * mlp_e(x) every expert on every token, most of them times zero
    y = einsum over weights[ids]             the weights of chosen experts, gathered for each token

The part of the graph between a router's logits and the output is taken as a black box f(x, logits). Logits that let
each token have one expert alone show the MLP; weights of known output then show what the router gives to whom.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import experts, quantized_experts
from graphwright.ops.gated_activation import ACTIVATIONS
from graphwright.passes.moe._evaluate import Sizes, UnknownError, between, constants, evaluate
from graphwright.passes.moe._router import Routing, search
from graphwright.program import Program

aten = torch.ops.aten

SURE = 40.0
"""A logit that leaves nothing for the others, and does not overflow."""

ATTEMPTS = 24
"""Nodes of the right shape behind a router that may be the end of its mixture."""

RAISED = {experts.target, quantized_experts.target}
"""Experts that are understood already."""

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default}


@dataclass(frozen=True)
class Whole:
    """A black box: tokens `x` [..., K] and logits [..., E] go in, `end` comes out."""

    x: fx.Node
    logits: fx.Node
    end: fx.Node
    stacks: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...]

    @property
    def count(self) -> int:
        """E."""
        return int(self.logits.meta["val"].shape[-1])


@dataclass(frozen=True)
class StackedMlp:
    """Which stored stacks are gate, up and down, and how.

    Attributes:
        into: the stacks before the activation, the gate first; one of both where it holds them below each other.
        down: the stack after it.
        flipped: whether the stacks are [E, K, N].
        into_bias: as `into`, or empty.
        down_bias: [E, N] or None.
        activation: see `experts`.
        gated: see `experts`.
    """

    into: tuple[fx.Node, ...]
    down: fx.Node
    flipped: bool
    into_bias: tuple[fx.Node, ...]
    down_bias: fx.Node | None
    activation: str
    gated: bool

    def tensors(self, program: Program) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weights and biases as `experts` takes them."""

        def stored(node: fx.Node) -> Tensor:
            weight = program.weight(node)
            return weight.transpose(1, 2) if self.flipped else weight

        up = torch.cat([stored(node) for node in self.into], 1)
        up_bias = torch.cat([program.weight(node) for node in self.into_bias], 1) if self.into_bias else None
        down_bias = None if self.down_bias is None else program.weight(self.down_bias)
        return up, up_bias, stored(self.down), down_bias


def find_whole(program: Program, logits: fx.Node) -> Iterator[Whole]:
    """What may be the mixture of experts behind a linear layer; small parts first."""
    value = logits.meta["val"]
    if value.dim() < 2 or value.shape[-1] not in _stack_sizes(program):
        return
    x = cast(fx.Node, logits.args[0])
    while x.target in VIEWS and x.args[0].meta["val"].shape[-1] == x.meta["val"].shape[-1]:
        x = cast(fx.Node, x.args[0])
    given = x.meta["val"]
    behind, attempts = {logits}, 0
    for node in program.graph.nodes:
        if behind.isdisjoint(node.all_input_nodes) or attempts > ATTEMPTS:
            continue
        behind.add(node)
        made = node.meta.get("val")
        if not isinstance(made, Tensor) or made.shape[-1:] != given.shape[-1:]:
            continue
        if str(made.numel()) == str(given.numel()):
            attempts += 1
            box = _box(x, logits, node)
            if box is not None:
                yield box


def _stack_sizes(program: Program) -> set[int]:
    """First sizes of stored stacks that something else than raised experts reads."""
    return {
        int(node.meta["val"].shape[0])
        for node in program.graph.nodes
        if node.op == "get_attr"
        and node.meta["val"].dim() == 3
        and node.meta["val"].shape[0] > 1
        and any(user.target not in RAISED for user in node.users)
    }


def _box(x: fx.Node, logits: fx.Node, end: fx.Node) -> Whole | None:
    count = int(logits.meta["val"].shape[-1])
    inside = list(between(end, {x, logits}))
    if any(node.op == "placeholder" or node.target in {aten.linear.default, *RAISED} for node in inside):
        return None
    read = [n for n in inside if n.op == "get_attr" and n.meta["val"].is_floating_point()]
    stacks = tuple(n for n in read if n.meta["val"].dim() == 3 and n.meta["val"].shape[0] == count)
    biases = tuple(n for n in read if n.meta["val"].dim() == 2 and n.meta["val"].shape[0] == count)
    return Whole(x, logits, end, stacks, biases) if len(stacks) in (2, 3) else None


def understood(program: Program, box: Whole, generator: torch.Generator) -> StackedMlp:
    """The MLP in a black box.

    Raises:
        UnknownError: it is none of the known ones.
    """
    sizes = Sizes(box.x.meta["val"].shape)
    x = torch.randn(sizes.shape, generator=generator).to(box.x.meta["val"].dtype)
    owner = torch.arange(sizes.tokens) % box.count
    logits = torch.full((sizes.tokens, box.count), -SURE)
    logits[torch.arange(sizes.tokens), owner] = SURE
    seen = _run(program, box, sizes, x, logits)
    kept = seen.abs().amax(1) > 0
    if not torch.equal(owner[kept].unique(), owner.unique()):
        raise UnknownError("some experts take no token that wants them alone")
    rows, ids = x.reshape(sizes.tokens, -1)[kept], owner[kept, None]
    ones = torch.ones(len(rows), 1)
    for mlp in _mlps(program, box):
        parts = (mlp.activation, mlp.gated)
        found = experts.reference(rows, ones, ids, *mlp.tensors(program), *parts).float()
        scale = float((found * seen[kept]).sum() / found.square().sum().clamp_min(1e-30))
        if relative_error(found * scale, seen[kept]) <= EXACT_TOLERANCE[x.dtype]:
            return mlp
    raise UnknownError("what its experts compute is none of the known MLPs")


def _mlps(program: Program, box: Whole) -> Iterator[StackedMlp]:
    """Every MLP that the shapes of the stacks allow."""
    width = int(box.x.meta["val"].shape[-1])
    for order in itertools.permutations(box.stacks):
        *into, down = order
        for flipped in (False, True):
            first, second = (1, 2) if not flipped else (2, 1)
            shapes = [(int(n.meta["val"].shape[first]), int(n.meta["val"].shape[second])) for n in order]
            inner = shapes[-1][1]
            gated = sum(rows for rows, _ in shapes[:-1]) == 2 * inner
            if shapes[-1][0] != width or any(columns != width for _, columns in shapes[:-1]):
                continue
            if not gated and (len(into) > 1 or shapes[0][0] != inner):
                continue
            for biases in itertools.permutations(box.biases):
                parted = _parted(into, biases, [rows for rows, _ in shapes])
                if parted is not None:
                    for activation in ACTIVATIONS:
                        yield StackedMlp(tuple(into), down, flipped, *parted, activation, gated)


def _parted(
    into: list[fx.Node], biases: tuple[fx.Node, ...], rows: list[int]
) -> tuple[tuple[fx.Node, ...], fx.Node | None] | None:
    """Biases before and after the activation, if they fit."""
    widths = [int(bias.meta["val"].shape[1]) for bias in biases]
    if not biases:
        return (), None
    if widths == rows:
        return biases[: len(into)], biases[-1]
    if widths == rows[:-1]:
        return biases, None
    return ((), biases[0]) if widths == rows[-1:] else None


def routed(program: Program, box: Whole, mlp: StackedMlp, generator: torch.Generator) -> Routing:
    """The router in a black box whose MLP is known.

    Raises:
        UnknownError: it is none that is known.
    """

    def observe(sizes: Sizes, given: Tensor) -> Tensor:
        return _given_to(program, box, mlp, sizes, given)

    inside = list(between(box.end, {box.x, box.logits}))
    top_ks = {int(n.args[1]) for n in inside if n.target is aten.topk.default and isinstance(n.args[1], int)}
    top_ks |= {1, box.count} | {int(c) for c in constants(box.end, {box.x, box.logits}) if c in range(1, 9)}
    wanted = sorted(k for k in top_ks if k <= box.count)
    return search(program, box.logits, [box.end], wanted, observe, generator)


def _given_to(program: Program, box: Whole, mlp: StackedMlp, sizes: Sizes, logits: Tensor) -> Tensor:
    """The weight [tokens, E] with which each expert's output goes to each token.

    All tokens and experts get the same inputs and first weights, and so the same row h between the products. The last
    weights turn h into a one in the column that stands for the expert, so many experts at a time as there are columns.
    """
    value = box.x.meta["val"]
    shape = Sizes(value.shape)
    shape.symbols = {**shape.symbols, **sizes.symbols}
    width = int(value.shape[-1])
    x = torch.ones(tuple(shape.of(size) for size in value.shape), dtype=value.dtype)
    up, _, down, _ = mlp.tensors(program)
    bound: dict[fx.Node, Any] = {n: torch.zeros_like(program.weight(n)) for n in box.biases}
    bound |= {n: torch.full_like(program.weight(n), 1.0 / width) for n in mlp.into}
    ones = torch.ones(1, 1)
    same = torch.full_like(up[:1], 1.0 / width)
    parts = []
    for start in range(0, box.count, width):
        last = torch.zeros_like(down)
        for expert in range(start, min(start + width, box.count)):
            last[expert, expert - start] = 1.0
        bound[mlp.down] = (last.transpose(1, 2) if mlp.flipped else last).contiguous()
        unit = last[start : start + 1]
        known = experts.reference(
            x.reshape(-1, width)[:1], ones, ones.long() * 0, same, None, unit, None, mlp.activation, mlp.gated
        )
        seen = _run(program, box, shape, x, logits, bound)
        parts.append(seen[:, : min(width, box.count - start)] / float(known[0, 0]))
    return torch.cat(parts, 1)


def _run(
    program: Program, box: Whole, sizes: Sizes, x: Tensor, logits: Tensor, bound: dict[fx.Node, Any] | None = None
) -> Tensor:
    """The output [tokens, K] for some inputs."""
    shape = tuple(sizes.of(size) for size in box.logits.meta["val"].shape)
    values = {**(bound or {}), box.x: x, box.logits: logits.reshape(shape).to(box.logits.meta["val"].dtype)}
    end = evaluate(program, [box.end], sizes.bind(box.end, values))[0]
    return cast(Tensor, end).reshape(-1, x.shape[-1]).float()
