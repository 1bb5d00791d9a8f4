"""Which rows and columns of which weights must go together, found from the graph, and cutting them out of it.

    groups = channel_groups(program) + head_groups(program)[0]
    with Editor(program, "prune") as editor:
        for group in groups: cut(editor, group, keep)          # keep: bool [units]

Channels: calls that treat every channel alike connect what they read and write; each connected component that only
linear layers feed and only linear layers read is a group, whose units are its channels. The residual stream is no
such component. Heads: a unit is one key-value head with all the query heads that read it, or one
query head where all read the same keys; its rows of the projections, and the sizes in the graph that count heads, are
found by sending numbers through everything between the projections and attention, and a cut is tried on these numbers
before it is offered. Names of modules are never read (Fang et al. 2023, DepGraph, arXiv:2301.12900; Ma et al. 2023,
LLM-Pruner, arXiv:2305.11627).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from graphwright import clean, structure
from graphwright.evaluate import shape_at, size_at
from graphwright.folding import PER_TOKEN, PROBE, REARRANGING, SIZES, Operand, keeps_channels, value_of
from graphwright.ops import attention, gated_activation, rms_norm, rope
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}


@dataclass(frozen=True)
class Member:
    """A constant that loses a part: int64 [units, n], the places of each unit along the operand's axis."""

    operand: Operand
    places: Tensor


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one.

    Attributes:
        name: of the weight that reads the units.
        members: every constant that has a part per unit; those with axis 1 read the units.
        source: the tensor [..., K] that the readers read.
        views: reshapes, the place of a literal size that shrinks with the units, and by how much for each.
    """

    name: str
    members: tuple[Member, ...]
    source: fx.Node
    views: tuple[tuple[fx.Node, int, int], ...] = ()

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.members[0].places)


def split_merged(editor: Editor) -> None:
    """Gives each slice of a linear layer's result a linear layer of its own, so that each can lose rows alone."""
    for node, weight in structure.linears(editor.program):
        parts = _slices(node)
        if parts is None:
            continue
        names = [weight, *node.args[2:]]
        for part, (start, stop) in parts.items():
            stored = [None if name is None else _rows_of(editor, name, start, stop, before=part) for name in names]
            own = editor.call(aten.linear.default, node.args[0], *stored, before=part)
            part.replace_all_uses_with(own)


def channel_groups(program: Program) -> list[Group]:
    """Groups of channels between linear layers, in graph order of their readers."""
    network: networkx.Graph[fx.Node] = networkx.Graph()
    for node in program.calls():
        if not _is_float(node):
            continue
        network.add_node(node)
        if _is_channelwise(node):
            sources = [source for source in node.all_input_nodes if source not in _added(node)]
            network.add_edges_from((source, node) for source in sources if _same_channels(source, node))
    found = [_channel_group(program, component) for component in networkx.connected_components(network)]
    return _ordered(program, [group for group in found if group is not None])


def head_groups(program: Program) -> tuple[list[Group], list[str]]:
    """Groups of key-value heads with their query heads, and why other attentions have none."""
    found, misses = [], []
    for node in program.calls(attention.target):
        try:
            found.append(_head_group(program, node))
        except _NoGroupError as reason:
            misses.append(f"{node.name}: {reason}")
    return found, misses


def tied(program: Program, group: Group) -> str:
    """The name of a weight that something outside the group reads too, so that no part of it may go; else empty.

    What attention reads of each head is the model's own and may differ between layers.
    """
    members = {(m.operand.node, m.operand.position) for m in group.members}
    names = {str(node.args[position].target) for node, position in members if node.target is not attention.target}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in names:
            for user in node.users:
                if not any((user, place) in members for place, arg in enumerate(user.args) if arg is node):
                    return str(node.target)
    return ""


def cut(editor: Editor, group: Group, keep: Tensor) -> None:
    """Removes the units that `keep`, bool [units], leaves out. Call `settle` when all cuts are made."""
    program = editor.program
    for member in group.members:
        operand, places = member.operand, member.places
        whole = value_of(program, operand)
        gone = torch.zeros(whole.shape[operand.axis], dtype=torch.bool)
        gone[places[~keep].flatten()] = True
        rest = whole.index_select(operand.axis, (~gone).nonzero()[:, 0]).contiguous()
        read = operand.node.args[operand.position]
        operand.node.update_arg(operand.position, editor.weight(f"{read.target}_cut", rest, before=operand.node))
    for view, place, per_unit in group.views:
        sizes = list(view.args[1])
        sizes[place] -= per_unit * int((~keep).sum())
        view.update_arg(1, sizes)
    editor.note(group.source, f"{group.name}: {int((~keep).sum())} of {group.units}")


def settle(program: Program) -> None:
    """Computes all shapes anew."""
    for node in program.calls():
        node.meta.pop("val", None)
    clean.refresh(program.module)


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _is_channelwise(node: fx.Node) -> bool:
    if node.target is gated_activation.target:
        return True
    if node.target in PER_TOKEN:
        return keeps_channels(node)
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _same_channels(source: fx.Node, node: fx.Node) -> bool:
    value = source.meta["val"]
    return isinstance(value, Tensor) and value.dim() > 0 and bool(value.shape[-1] == node.meta["val"].shape[-1])


def _channel_group(program: Program, component: set[fx.Node]) -> Group | None:
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    makers, readers, views = [], [], []
    for node in sorted(component, key=order.__getitem__):
        if node.op != "call_function":
            return None
        if _is_linear(node):
            makers.append(node)
        elif not _is_channelwise(node) or any(
            isinstance(s.meta["val"], Tensor) and s not in component and s not in _added(node)
            for s in node.all_input_nodes
        ):
            return None
        elif node.target in VIEWS and not isinstance(node.args[1][-1], fx.Node) and node.args[1][-1] != -1:
            views.append((node, len(node.args[1]) - 1, 1))
        for user in node.users:
            if user in component or user.target in SIZES:
                continue
            if not _is_linear(user) or user.args[0] is not node:
                return None
            readers.append(user)
    if not makers or not readers:
        return None
    width = int(makers[0].meta["val"].shape[-1])
    places = torch.arange(width)[:, None]
    members = [Member(operand, places) for reader in readers for operand in (Operand(reader, 1, 1),)]
    members += [Member(operand, places) for maker in makers for operand in _rows(maker)]
    members += [Member(Operand(node, 1, 0), places) for node in component if _added(node)]
    return Group(str(readers[0].args[1].target), tuple(members), readers[0].args[0], tuple(views))


PASSING = {rope.target: 0, rms_norm.target: 0, aten.layer_norm.default: 0, aten.mul.Tensor: 0, aten.div.Tensor: 0,
           aten.neg.default: 0}  # fmt: skip
"""Operations that may stand between a projection and attention and treat every head alike, and what they treat."""

MOVING = REARRANGING | {aten.select.int, aten.index.Tensor, aten.cat.default}
"""Operations that only move numbers, perhaps of several tensors."""


def _head_group(program: Program, node: fx.Node) -> Group:
    """Where keys and values have one head, a unit is a query head; else a key-value head with its query heads."""
    sizes = program.contract.sizes(PROBE)
    heads, kv_heads = (shape_at(program, node.args[place], sizes)[1] for place in (0, 1))
    share = 1 if kv_heads == 1 else heads // kv_heads
    inputs = _Inputs(program, node, heads // share, shared_keys=kv_heads == 1)
    reader, columns, views = _reader(program, node, share)
    members = [Member(Operand(reader, 1, 1), columns), *inputs.members()]
    per_head = torch.arange(heads).view(-1, share)
    for position, name in ((6, "ALiBi slopes"), (7, "sinks")):
        constant = node.args[position] if len(node.args) > position else None
        if constant is not None:
            if constant.op != "get_attr":
                raise _NoGroupError(f"the {name} are computed")
            members.append(Member(Operand(node, position, 0), per_head))
    bias = node.args[5] if len(node.args) > 5 else None
    if bias is not None and shape_at(program, bias, sizes)[-3:-2] != (1,):
        raise _NoGroupError("a bias differs between heads")
    counts = tuple(dict.fromkeys([*inputs.views(), *views]))
    inputs.prove(members, counts)
    return Group(str(reader.args[1].target), tuple(members), reader.args[0], counts)


class _Inputs:
    """What query, key and value of an attention come from.

    Args:
        program: of the attention.
        node: the attention.
        units: number of units that its heads make up, each as many neighbouring heads as another.
        shared_keys: all units read the same keys and values, which therefore stay.
    """

    def __init__(self, program: Program, node: fx.Node, units: int, *, shared_keys: bool) -> None:
        self.program, self.units = program, units
        self.arguments = node.args[:1] if shared_keys else node.args[:3]
        self.between = _between(self.arguments)
        self.makers = [found for found in self.between if _is_linear(found)]
        self.shapes = {found: shape_at(program, found, program.contract.sizes(PROBE)) for found in self.makers}

    def members(self) -> list[Member]:
        """Rows of the projections, and of what is added to them, by unit."""
        found = []
        for maker in self.makers:
            places = self.places(maker, -1)
            if places is not None:
                found += [Member(operand, places) for operand in _rows(maker)]
        for node in self.between:
            if node.target is aten.add.Tensor:
                places = self.places(node, -1)
                if places is not None:
                    found.append(Member(Operand(node, 1, 0), places))
        if not found:
            raise _NoGroupError("no row of a projection belongs to one head alone")
        return found

    def views(self) -> list[tuple[fx.Node, int, int]]:
        """Literal sizes that count heads, or parts of them."""
        found = []
        for node in self.between:
            for axis, size in enumerate(node.args[1] if node.target in VIEWS else ()):
                if isinstance(size, int) and size != -1:
                    places = self.places(node, axis)
                    if places is not None:
                        found.append((node, axis, places.shape[1]))
        return found

    def places(self, node: fx.Node, axis: int) -> Tensor | None:
        """The places along an axis of a node that each unit is made from, int64 [units, n]; None if all share them."""
        shape = shape_at(self.program, node, self.program.contract.sizes(PROBE))
        along = [-1 if a == axis % len(shape) else 1 for a in range(len(shape))]
        starts = {maker: torch.full(self.shapes[maker], -1) for maker in self.makers}
        starts[node] = torch.arange(shape[axis]).view(along).expand(shape)
        flow = _Flow(self.program, starts)
        parts: list[set[int]] = [set() for _ in range(self.units)]
        for argument in self.arguments:
            value = flow.value(argument)
            for unit, own in enumerate(value.chunk(self.units, 1)):
                parts[unit].update(own.unique().tolist())
        parts = [part - {-1} for part in parts]
        if all(part == parts[0] for part in parts):
            return None
        if sum(map(len, parts)) != len(set().union(*parts)) or len(set(map(len, parts))) != 1:
            raise _NoGroupError(f"heads share a part of {node.name}")
        return torch.tensor([sorted(part) for part in parts])

    def prove(self, members: Sequence[Member], views: Sequence[tuple[fx.Node, int, int]]) -> None:
        """Cuts the first, the last or a middle unit of row numbers, and looks what arrives.

        Raises:
            _NoGroupError: not the rows of the other units.
        """
        numbers, first = {}, 0
        for maker in self.makers:
            shape = self.shapes[maker]
            numbers[maker] = (first + torch.arange(shape[-1])).expand(shape)
            first += shape[-1]
        whole = [_Flow(self.program, numbers).value(argument) for argument in self.arguments]
        owned = {m.operand.node: m.places for m in members if m.operand.node in numbers}
        for unit in {0, self.units // 2, self.units - 1}:
            starts = dict(numbers)
            for maker, places in owned.items():
                stay = ~torch.isin(torch.arange(self.shapes[maker][-1]), places[unit])
                starts[maker] = numbers[maker][..., stay]
            sizes: dict[fx.Node, list[Any]] = {}
            for node, axis, per_unit in views:
                sizes.setdefault(node, list(node.args[1]))[axis] -= per_unit
            flow = _Flow(self.program, starts, sizes)
            for argument, value in zip(self.arguments, whole, strict=True):
                parts = value.chunk(self.units, 1)
                wanted = torch.cat([part for place, part in enumerate(parts) if place != unit], 1)
                if not torch.equal(flow.value(argument), wanted):
                    raise _NoGroupError("sizes in the graph do not follow the number of heads")


class _Flow:
    """Numbers on their way through operations that only move them.

    Args:
        program: of the nodes.
        starts: values of some nodes.
        sizes: other arguments of reshapes.
    """

    def __init__(
        self, program: Program, starts: dict[fx.Node, Tensor], sizes: dict[fx.Node, list[Any]] | None = None
    ) -> None:
        self.program, self.known, self.sizes = program, dict(starts), sizes or {}
        self.probe = program.contract.sizes(PROBE)

    def value(self, node: fx.Node) -> Any:
        """The numbers of a node.

        Raises:
            _NoGroupError: they do not fit any more.
        """
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.target in PASSING or node.target in (aten.add.Tensor, aten.to.dtype):
            return self.value(node.args[0])
        given = (node.args[0], self.sizes[node], *node.args[2:]) if node in self.sizes else node.args
        args, kwargs = fx.node.map_arg((given, dict(node.kwargs)), self._argument)
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            raise _NoGroupError(f"{node.name} takes no other number of heads") from error

    def _argument(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and node not in self.known:
            return self.program.weight(node)
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return size_at(self.program, value, self.probe)
        return value if isinstance(value, int) else self.value(node)


def _between(arguments: Sequence[Any]) -> list[fx.Node]:
    """The projections behind arguments of attention, and everything in between.

    Raises:
        _NoGroupError: something in between may treat heads differently.
    """
    found: dict[fx.Node, None] = {}
    waiting = list(arguments)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = None
        if _is_linear(node):
            continue
        _refuse_between(node)
        sources = node.args[0] if node.target is aten.cat.default else node.args[:1]
        waiting += [source for source in sources if isinstance(source, fx.Node)]
    return list(found)


def _refuse_between(node: fx.Node) -> None:
    if node.target is aten.add.Tensor:
        added = node.args[1]
        constant = isinstance(added, fx.Node) and added.op == "get_attr" and added.meta["val"].dim() == 1
        if node.kwargs or not constant or added.meta["val"].shape[0] != node.meta["val"].shape[-1]:
            raise _NoGroupError(f"{node.name} adds something to heads")
    elif node.target in (aten.mul.Tensor, aten.div.Tensor):
        if not isinstance(node.args[1], (int, float)):
            raise _NoGroupError(f"{node.name} multiplies heads by a tensor")
    elif node.target in (rms_norm.target, aten.layer_norm.default):
        if node.meta["val"].dim() != 4:
            raise _NoGroupError(f"{node.name} normalizes over heads")
    elif node.target is aten.index.Tensor:
        if any(index is not None and index.op != "get_attr" for index in node.args[1]):
            raise _NoGroupError(f"{node.name} looks heads up by a computed index")
    elif node.target not in MOVING and node.target not in PASSING:
        raise _NoGroupError(f"{node.name} stands between a projection and attention")


def _reader(program: Program, node: fx.Node, share: int) -> tuple[fx.Node, Tensor, list[tuple[fx.Node, int, int]]]:
    """The linear layer that reads an attention's result, its columns by unit, and the reshapes in between."""
    sizes = program.contract.sizes(PROBE)
    batch, heads, length, width = shape_at(program, node, sizes)
    numbers = torch.arange(heads * width).view(1, heads, 1, width).expand(batch, -1, length, -1)
    flow, current, views = _Flow(program, {node: numbers}), node, []
    while True:
        users = [user for user in current.users if user.target not in SIZES]
        if len(users) != 1:
            raise _NoGroupError(f"{current.name} has {len(users)} readers")
        if _is_linear(users[0]) and users[0].args[0] is current:
            break
        current = users[0]
        if current.target not in REARRANGING:
            raise _NoGroupError(f"{current.name} stands between attention and its projection")
        views += _unit_sizes(current, flow.value(current) // (width * share))
    rows = flow.value(current).flatten(0, -2)
    if (rows != rows[0]).any() or len(rows[0].unique()) != heads * width:
        raise _NoGroupError("the output projection does not read each head once")
    return users[0], rows[0].argsort().view(heads // share, -1), views


def _unit_sizes(node: fx.Node, owner: Tensor) -> list[tuple[fx.Node, int, int]]:
    """Literal sizes of a reshape along whose axis `owner`, the unit of each element, changes."""
    found = []
    for axis, size in enumerate(node.args[1] if node.target in VIEWS else ()):
        slices = owner.movedim(axis, 0).flatten(1)
        if not isinstance(size, int) or size == -1 or (slices == slices[0]).all():
            continue
        counts = slices[:, 0].unique(return_counts=True)[1]
        if (slices != slices[:, :1]).any() or (counts != counts[0]).any():
            raise _NoGroupError(f"{node.name} mixes heads")
        found.append((node, axis, int(counts[0])))
    return found


def _added(node: fx.Node) -> list[fx.Node]:
    """The constant vector with an element per channel that a call adds to a tensor, or nothing."""
    if node.target is not aten.add.Tensor or node.kwargs or not isinstance(node.args[1], fx.Node):
        return []
    value = node.args[1].meta["val"]
    vector = node.args[1].op == "get_attr" and value.dim() == 1 and value.shape[0] == node.meta["val"].shape[-1]
    return [node.args[1]] if vector else []


def _is_linear(node: fx.Node) -> bool:
    if node.target is not aten.linear.default:
        return False
    return all(isinstance(a, fx.Node) and a.op == "get_attr" for a in node.args[1:] if a is not None)


def _rows(maker: fx.Node) -> list[Operand]:
    return [Operand(maker, place, 0) for place in range(1, len(maker.args)) if maker.args[place] is not None]


def _slices(node: fx.Node) -> dict[fx.Node, tuple[int, int]] | None:
    """The parts of a linear layer's result that its users read, with first and last row, if that is all they do."""
    width, dims = int(node.meta["val"].shape[-1]), node.meta["val"].dim()
    users = [user for user in node.users if user.target not in SIZES]
    found: dict[fx.Node, tuple[int, int]] = {}
    for user in users:
        if user.target is aten.slice.Tensor:
            axis, start, stop = (*user.args[1:4], None, None, None)[:3]
            step = user.args[4] if len(user.args) > 4 else 1
            if not isinstance(start, int) or not isinstance(stop, int) or axis % dims != dims - 1 or step != 1:
                return None
            first, last, _ = slice(start, stop).indices(width)
            found[user] = (first, last)
        elif user.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
            axis = user.args[2] if len(user.args) > 2 else 0
            if axis % dims != dims - 1 or any(item.args[0] is not user for item in user.users):
                return None
            ends = torch.tensor([int(part.shape[-1]) for part in user.meta["val"]]).cumsum(0).tolist()
            for item in user.users:
                index = int(item.args[1])
                found[item] = (ends[index - 1] if index else 0, ends[index])
        else:
            return None
    return found or None


def _rows_of(editor: Editor, weight: Any, start: int, stop: int, before: fx.Node) -> fx.Node:
    return editor.weight(f"{weight.target}_rows", editor.program.weight(weight)[start:stop].clone(), before)


def _ordered(program: Program, groups: list[Group]) -> list[Group]:
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    return sorted(groups, key=lambda group: order[group.source])


class _NoGroupError(Exception):
    """Why an attention's heads cannot be cut."""
