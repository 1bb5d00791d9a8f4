"""At which sizes and with which padding a mask is evaluated, and what comes out.

A window or chunk only shows in a sequence that is longer, so every whole number in the mask's sub-graph, and every
dimension of a constant in it, adds a length. What lies beyond `LONGEST` cannot be tried, and then nothing is claimed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.contract import resolve
from graphwright.evaluate import dims_of, evaluate, shape_at
from graphwright.passes.raise_._attention_parts import shape
from graphwright.passes.raise_._mask_structure import Case
from graphwright.passes.raise_._mask_terms import Leaf
from graphwright.program import Program

LONGEST = 8300
SHORT = 2100
"""A context of this length is tried as a whole."""
LENGTHS = (5, 12)
LONG = 300
"""From here on one row of padding is tried instead of three kinds."""


class UnknownMaskError(Exception):
    """The mask cannot be evaluated, or not at the sizes that it asks for."""


@dataclass(frozen=True)
class Trial:
    """Concrete sizes and an attention mask to evaluate at."""

    sizes: dict[str, int]
    attention_mask: Tensor | None
    """Bool [B, T]; None if the program has none."""


class Probe:
    """Evaluates parts of the bias of one attention."""

    def __init__(self, program: Program, query: fx.Node, key: fx.Node) -> None:
        self.program, self.query, self.key = program, query, key
        self.mask_spec = program.contract.input("attention_mask")
        self.batch_dims = dims_of(program, query.meta["val"].shape[0])
        self.query_dims = dims_of(program, query.meta["val"].shape[2])
        self.key_dims = dims_of(program, key.meta["val"].shape[2])
        mask_node = next((n for n in program.graph.nodes if self.mask_spec and n.target == self.mask_spec.name), None)
        length = shape(mask_node)[1] if mask_node is not None else None
        self._refuse_specialised()
        self.pads_queries, self.pads_keys = shape(query)[2] == length, shape(key)[2] == length

    def _refuse_specialised(self) -> None:
        # aten.polar's shape function fixes symbolic sizes (torch 2.13); what holds at one size proves nothing then.
        contract = self.program.contract
        shapes = {spec.name: spec.shape for spec in contract.inputs} | {s.name: s.shape for s in contract.state}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            for dim, size in zip(shapes[node.target], node.meta["val"].shape, strict=True):
                if isinstance(dim, str) and not (isinstance(size, torch.SymInt) and size.node.expr.free_symbols):
                    raise UnknownMaskError(f"shape propagation has fixed the dimension {dim} at {size}")

    def values(self, nodes: list[fx.Node], trial: Trial) -> list[Tensor]:
        """Values of nodes of the index domain.

        Raises:
            UnknownMaskError: they cannot be computed.
        """
        try:
            return evaluate(self.program, nodes, attention_mask=trial.attention_mask, sizes=trial.sizes)
        except Exception as error:
            raise UnknownMaskError(f"it cannot be evaluated ({type(error).__name__}: {error})") from error

    def first(self) -> Trial:
        """A short trial without padding."""
        return next(self.trials(LENGTHS[-1:]))

    def trials(self, lengths: Iterable[int]) -> Iterator[Trial]:
        """For each length, no padding first and then padding on the right, on the left, and anywhere."""
        for length in lengths:
            for kind in ("none", "right", "left", "holes") if length < LONG else ("none", "holes"):
                sizes = self._sizes(length, 3 if length < LONG else 1)
                if self.mask_spec is None:
                    yield Trial(sizes, None)
                    break
                yield Trial(sizes, _padding(resolve(self.mask_spec.shape, sizes), kind))

    def lengths(self, nodes: Iterable[fx.Node]) -> list[int]:
        """Lengths at which the structure of these nodes must show.

        Raises:
            UnknownMaskError: one of them is too long to try.
        """
        longest = max((self.program.contract.dim(name).max for name in self.key_dims | self.query_dims), default=0)
        wanted = {*LENGTHS} | ({longest} if longest <= SHORT else set())
        for number, exact in numbers(self.program, nodes):
            if exact:
                wanted.add(min(number, longest))
            elif number <= longest:
                wanted |= {number, min(number + 3, longest)}
        if max(wanted) > LONGEST:
            raise UnknownMaskError(f"it may change at length {max(wanted)}, which is more than is tried ({LONGEST})")
        return sorted(length for length in wanted if length > 1 or longest == 1)

    def case(self, leaves: tuple[Leaf, ...], trial: Trial) -> Case:
        """What all these masks let through together.

        Raises:
            UnknownMaskError: they cannot be computed, or differ between heads.
        """
        batch, _heads, queries, _width = shape_at(self.program, self.query, trial.sizes)
        keys = shape_at(self.program, self.key, trial.sizes)[2]
        allowed = torch.ones(batch, queries, keys, dtype=torch.bool)
        for leaf, value in zip(leaves, self.values([leaf.node for leaf in leaves], trial), strict=True):
            if leaf.kind == "additive" and not ((value == 0) | (value <= -1e4)).all():
                raise UnknownMaskError("it is a mask at some sizes only")
            part = leaf.allowed(value)
            part = part.reshape((1,) * (4 - part.dim()) + tuple(part.shape))
            if part.shape[1] != 1 and not (part == part[:, :1]).all():
                raise UnknownMaskError("it differs between heads")
            try:
                allowed = allowed & part[:, 0]
            except RuntimeError as error:
                raise UnknownMaskError(f"its shape does not fit at length {keys}") from error
        padding = trial.attention_mask
        return Case(allowed, padding if self.pads_keys else None, padding if self.pads_queries else None)

    def _sizes(self, length: int, batch: int) -> dict[str, int]:
        queries = length if self.query_dims == self.key_dims else length // 2 + 2
        wanted = {
            **dict.fromkeys(self.query_dims, queries),
            **dict.fromkeys(self.key_dims, length),
            **dict.fromkeys(self.batch_dims, batch),
        }
        return self.program.contract.sizes(wanted)


def numbers(program: Program, nodes: Iterable[fx.Node]) -> set[tuple[int, bool]]:
    """Whole numbers > 1 in the sub-graph of `nodes`; dimensions of constants are marked as exact."""
    found: set[tuple[int, bool]] = set()
    for node in ancestors(nodes):
        if node.op == "get_attr":
            tensor = program.weight(node)
            found |= {(size, True) for size in tensor.shape}
            found |= {(abs(int(tensor)), False)} if tensor.numel() == 1 and tensor.isfinite() else set()
        elif node.op == "call_function":
            flat: list[Any] = []
            torch.utils._pytree.tree_map(flat.append, (node.args, dict(node.kwargs)))
            plain = [v for v in flat if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1 << 40]
            found |= {(abs(int(value)), False) for value in plain if value == int(value)}
    return {(number, exact) for number, exact in found if number > 1}


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that these depend on, themselves included."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _padding(size: tuple[int, ...], kind: str) -> Tensor:
    batch, length = size
    generator = torch.Generator().manual_seed(length)
    steps = torch.arange(length)
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if kind == "none":
        return torch.ones(size, dtype=torch.bool)
    if kind == "right":
        return steps < real
    if kind == "left":
        return steps >= length - real
    holes = torch.rand(size, generator=generator) < 0.7
    return holes | (steps == real - 1)
