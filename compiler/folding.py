"""Folding scales and shifts into weights: channels change where they are made and change back where they are read.

    for site in scale_sites(program):
        fold_scale(editor, site, scale)          # the function stays what it was
        if shiftable(site):
            fold_shift(editor, site, shift)      # and so it does here

A site is a tensor whose channels only linear layers read (also through reshapes and the gather of a mixture of
experts) and that a norm or a linear layer makes. Which output row of the maker each channel comes from is found by
sending row numbers through the operations in between: reshapes, slices of merged matrices, the value path of an
attention with shared heads, the linear side of a gated activation. No name of a module is ever read.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.evaluate import shape_at, size_at
from graphwright.ops import attention, experts, gated_activation, grouped_linear, rms_norm
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

REARRANGING = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.contiguous.default, aten.clone.default, aten.to.dtype,
    aten.alias.default, operator.getitem,
}  # fmt: skip
"""Operations that only move numbers."""

PER_TOKEN = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default,
    aten.to.dtype, aten.alias.default, aten.index.Tensor, aten.unsqueeze.default, aten.gather.default,
}  # fmt: skip
"""Operations that may stand between a tensor and the linear layers that read its channels."""

SIZES = {aten.sym_size.int}

PROBE = {"batch": 2, "sequence": 3}


@dataclass(frozen=True)
class Operand:
    """A constant argument of a call, and the axis along which a site's channels lie in it."""

    node: fx.Node
    position: int
    axis: int


@dataclass(frozen=True)
class Site:
    """A tensor whose channels can be rescaled for free.

    Attributes:
        source: the tensor [..., K].
        readers: the linear layers that read it.
        weights: what they multiply it with.
        maker: the norm or linear layer that makes it.
        made_by: the maker's gain, or weight and bias.
        rows: int64 [K], the maker's channel behind each channel of the source.
        channels: number of the maker's channels.
        attention: the attention whose values the maker makes, or None.
    """

    source: fx.Node
    readers: tuple[fx.Node, ...]
    weights: tuple[Operand, ...]
    maker: fx.Node
    made_by: tuple[Operand, ...]
    rows: Tensor
    channels: int
    attention: fx.Node | None

    @property
    def free(self) -> tuple[Tensor, Tensor]:
        """The maker's channels that the source shows, and for each channel of the source its place among them."""
        shown, place = self.rows.unique(return_inverse=True)
        return shown, place

    def shared_maximum(self, values: Tensor) -> Tensor:
        """The largest of values [K] over channels that come from one row, [free channels]."""
        shown, place = self.free
        return values.new_zeros(len(shown)).scatter_reduce(0, place, values, "amax", include_self=False)


def scale_sites(program: Program) -> list[Site]:
    """Every site of a program, in graph order of the tensors."""
    sources = dict.fromkeys(n.args[0] for n in program.calls(aten.linear.default, grouped_linear.target))
    starts = dict.fromkeys(before_per_token(node) for node in sources if isinstance(node, fx.Node))
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    sites = [_site(program, node) for node in sorted(starts, key=order.__getitem__)]
    return [site for site in sites if site is not None]


def fold_scale(editor: Editor, site: Site, scale: Tensor) -> None:
    """Divides the channels of a site by `scale` where they are made and multiplies them where they are read.

    Args:
        editor: of the program that the site is part of.
        site: from `scale_sites`.
        scale: positive, float32, [free channels] of the site.
    """
    shown, place = site.free
    for operand in site.weights:
        multiply(editor, operand, scale[place])
    whole = torch.ones(site.channels)
    whole[shown] = 1 / scale
    for operand in site.made_by:
        multiply(editor, operand, whole)
    editor.note(site.maker, f"scales of {len(site.readers)} layers")


def shiftable(site: Site) -> bool:
    """Whether numbers can be subtracted from a site's channels for free.

    Its maker and readers must be able to hold a bias, and nothing in between may do more than move or average: an
    attention averages values, unless sinks take a part of the weights.
    """
    if site.maker.target not in BIAS or any(reader.target is not aten.linear.default for reader in site.readers):
        return False
    between = (_path(site.source) or [])[:-1]
    sinks = [node for node in between if node.target is attention.target and _argument(node, 7, None) is not None]
    return not sinks and all(node.target in REARRANGING or node.target is attention.target for node in between)


def fold_shift(editor: Editor, site: Site, shift: Tensor) -> None:
    """Subtracts `shift` from the channels of a site where they are made; its readers add what that took away.

    Args:
        editor: of the program that the site is part of.
        site: one that is `shiftable`.
        shift: float32, [free channels] of the site.
    """
    shown, place = site.free
    for operand in site.weights:
        moved = value_of(editor.program, operand).float() @ shift[place]
        add_bias(editor, operand.node, moved)
    whole = torch.zeros(site.channels)
    whole[shown] = -shift
    add_bias(editor, site.maker, whole)
    editor.note(site.maker, f"shifts of {len(site.readers)} layers")


BIAS = {aten.linear.default: 2, aten.layer_norm.default: 3}
"""Calls that add a bias, and which argument it is."""


def add_bias(editor: Editor, node: fx.Node, bias: Tensor) -> None:
    """Adds a vector [N] to the bias of a call of `BIAS`, which may have none yet."""
    position, dtype = BIAS[node.target], node.meta["val"].dtype
    if len(node.args) <= position:
        node.args = (*node.args, *(None,) * (position + 1 - len(node.args)))
    old = node.args[position]
    total = bias if old is None else editor.program.weight(old).float() + bias
    editor.set_weight(node, position, total.to(dtype), "bias")


def constant(node: fx.Node, position: int, axis: int) -> Operand | None:
    """The constant that a call reads at `position`, also through a transposition of its last two axes."""
    found = node.args[position] if len(node.args) > position else None
    if not isinstance(found, fx.Node):
        return None
    if found.op == "get_attr":
        return Operand(node, position, axis)
    if found.target is aten.transpose.int and found.args[0].op == "get_attr" and len(found.users) == 1:
        first, second = (int(a) % 3 for a in found.args[1:3])
        if found.meta["val"].dim() == 3 and {first, second} == {1, 2} and axis:
            return Operand(found, 0, 3 - axis)
    return None


def value_of(program: Program, operand: Operand) -> Tensor:
    """The constant behind an operand."""
    read = operand.node.args[operand.position]
    return program.weight(read)


def multiply(editor: Editor, operand: Operand, factor: Tensor) -> None:
    """Multiplies a constant by `factor` [channels] along its axis; a gain that is left out counts as ones."""
    old = operand.node.args[operand.position]
    if old is None:
        tensor = factor.to(operand.node.meta["val"].dtype)
    else:
        value = value_of(editor.program, operand)
        shape = [-1 if axis == operand.axis else 1 for axis in range(value.dim())]
        offset = 1.0 if operand.node.target is rms_norm.target and _argument(operand.node, 3, False) else 0.0
        tensor = ((value.float() + offset) * factor.view(shape) - offset).to(value.dtype)
    editor.set_weight(operand.node, operand.position, tensor, "gain")


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def before_per_token(node: fx.Node) -> fx.Node:
    """The tensor that a linear layer's input is a selection of tokens of."""
    while node.target in PER_TOKEN and keeps_channels(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def keeps_channels(node: fx.Node) -> bool:
    """Whether a call of `PER_TOKEN` leaves the last dimension of its first argument as it is."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return False
    before, after = source.meta["val"], node.meta["val"]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not after.is_floating_point():
        return False
    if node.target is aten.gather.default:
        return int(node.args[1]) != before.dim() - 1
    if node.target is aten.index.Tensor:
        indices = node.args[1]
        return before.dim() == 2 and len(indices) == 1
    return bool(before.dim() and after.dim() and before.shape[-1] == after.shape[-1])


def readers(source: fx.Node) -> list[tuple[fx.Node, Operand]] | None:
    """All linear layers that read the channels of a tensor, or None if anything else does."""
    found: list[tuple[fx.Node, Operand]] = []
    for user in source.users:
        if user.target in SIZES:
            continue
        weight = None
        if user.args and user.args[0] is source and user.all_input_nodes.count(source) == 1:
            if user.target in (aten.linear.default, grouped_linear.target):
                weight = constant(user, 1, 1)
            elif user.target is experts.target:
                weight = constant(user, 3, 2)
            elif user.target in PER_TOKEN and keeps_channels(user):
                further = readers(user)
                if further is None:
                    return None
                found += further
                continue
        if weight is None:
            return None
        found.append((user, weight))
    return found


def _site(program: Program, source: fx.Node) -> Site | None:
    read = readers(source)
    path = _path(source)
    if not read or path is None:
        return None
    maker = path[-1]
    made_by = _made_by(maker)
    numbers = Rows(program, maker)
    rows = numbers.of(source)
    if made_by is None or rows is None or not _owned(path, rows, numbers):
        return None
    nodes, weights = zip(*read, strict=True)
    between = next((node for node in path if node.target is attention.target), None)
    return Site(source, nodes, weights, maker, made_by, rows, numbers.count, between)


def _path(source: fx.Node) -> list[fx.Node] | None:
    """The nodes from `source` up to the norm or linear layer that makes its channels."""
    path = [source]
    while path[-1].target not in MAKERS:
        node = path[-1]
        position = 0 if node.target in REARRANGING else UPSTREAM.get(node.target)
        if position is None or not isinstance(node.args[position], fx.Node):
            return None
        path.append(node.args[position])
    return path


UPSTREAM = {attention.target: 2, gated_activation.target: 1, aten.relu.default: 0}
"""Operations that commute with positive factors on the channels of this argument."""

MAKERS = {rms_norm.target, aten.layer_norm.default, aten.linear.default, grouped_linear.target}


def _made_by(maker: fx.Node) -> tuple[Operand, ...] | None:
    """The constants that divide the channels of a maker's result, or None if one of them is not constant."""
    if maker.target is rms_norm.target:
        return (Operand(maker, 1, 0),) if maker.args[1] is None or constant(maker, 1, 0) else None
    if maker.target is aten.layer_norm.default:
        wanted = [(2, 0), (3, 0)]
        if len(maker.args[1]) != 1 or _argument(maker, 2, None) is None:
            return None
    else:
        wanted = [(1, 2)] if maker.target is grouped_linear.target else [(1, 0), (2, 0)]
    operands = [constant(maker, *at) for at in wanted if _argument(maker, at[0], None) is not None]
    return None if None in operands else tuple(o for o in operands if o is not None)


def _owned(path: Sequence[fx.Node], rows: Tensor, numbers: "Rows") -> bool:
    """Whether nothing but the path reads the rows in question."""
    for below, node in itertools.pairwise(path):
        for user in node.users:
            if user is below or user.target in SIZES:
                continue
            others = numbers.of(user, whole=True) if user.target in REARRANGING else None
            if others is None or torch.isin(others, rows).any():
                return False
    return True


class Rows:
    """Row numbers of a maker on their way through the graph, at a small concrete size.

    Args:
        program: the maker's.
        maker: the call whose last axis is numbered.
        passing: operations that leave the rows of this argument where they are.
    """

    def __init__(self, program: Program, maker: fx.Node, passing: Mapping[Any, int] | None = None) -> None:
        self.program = program
        self.passing = UPSTREAM if passing is None else passing
        self.sizes = program.contract.sizes(PROBE)
        self.count = int(maker.meta["val"].shape[-1])
        shape = shape_at(program, maker, self.sizes)
        self.known: dict[fx.Node, Any] = {maker: torch.arange(self.count).expand(shape)}

    def at(self, node: fx.Node) -> Tensor | None:
        """The row number of every element of a node at the small size, or None if they cannot be followed."""
        try:
            value = self._value(node)
        except _UntraceableError:
            return None
        return value if isinstance(value, Tensor) else None

    def of(self, node: fx.Node, *, whole: bool = False) -> Tensor | None:
        """The row number of each channel [K] of a node, or all numbers in it; None if they differ between tokens."""
        try:
            value = self._value(node)
        except _UntraceableError:
            return None
        parts = value if isinstance(value, (list, tuple)) else [value]
        if whole:
            return torch.cat([part.flatten() for part in parts]).unique()
        rows = value.reshape(-1, value.shape[-1])
        return rows[0] if (rows == rows[0]).all() else None

    def _value(self, node: fx.Node) -> Any:
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.target is attention.target and attention.target in self.passing:
            value = self._value(node.args[2])
            query = shape_at(self.program, node.args[0], self.sizes)
            shared = value.repeat_interleave(query[1] // value.shape[1], 1)
            return shared[:, :, :1].expand(-1, -1, query[2], -1)
        if node.target in self.passing:
            return self._value(node.args[self.passing[node.target]])
        if node.target not in REARRANGING:
            raise _UntraceableError
        if node.target is aten.to.dtype:
            return self._value(node.args[0])
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._argument)
        return node.target(*args, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return size_at(self.program, value, self.sizes)
        return value if isinstance(value, int) else self._value(node)


class _UntraceableError(Exception):
    """The rows of the maker cannot be followed."""
