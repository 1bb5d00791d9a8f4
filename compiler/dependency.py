"""Which rows and columns of which weights must go together, found from the graph, and cutting them out of it.

    groups = channel_groups(program) + head_groups(program)[0]
    with Editor(program, "prune") as editor:
        for group in groups: cut(editor, group, keep)          # keep: bool [units]

Channels: calls that treat every channel alike connect what they read and write; each connected component that only
linear layers feed and only linear layers read is a group, whose units are its channels. The residual stream is no
such component. Heads: a unit is one key-value head with all the query heads that read it; its rows of the projections
are found by sending row numbers through the graph. Names of modules are never read (Fang et al. 2023, DepGraph,
arXiv:2301.12900; Ma et al. 2023, LLM-Pruner, arXiv:2305.11627).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from graphwright import clean, structure
from graphwright.evaluate import shape_at
from graphwright.folding import PER_TOKEN, PROBE, REARRANGING, SIZES, Operand, Rows, keeps_channels, value_of
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
        views: reshapes with the places of literal sizes that shrink with the units.
    """

    name: str
    members: tuple[Member, ...]
    source: fx.Node
    views: tuple[tuple[fx.Node, int], ...] = ()

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
            network.add_edges_from((source, node) for source in node.all_input_nodes if _same_channels(source, node))
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
    for view, place in group.views:
        sizes = list(view.args[1])
        sizes[place] = sizes[place] * int(keep.sum()) // group.units
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
            isinstance(s.meta["val"], Tensor) and s not in component for s in node.all_input_nodes
        ):
            return None
        elif node.target in VIEWS and not isinstance(node.args[1][-1], fx.Node) and node.args[1][-1] != -1:
            views.append((node, len(node.args[1]) - 1))
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
    return Group(str(readers[0].args[1].target), tuple(members), readers[0].args[0], tuple(views))


PASSING = {rope.target: 0, rms_norm.target: 0, aten.layer_norm.default: 0, aten.mul.Tensor: 0, aten.div.Tensor: 0,
           aten.neg.default: 0}  # fmt: skip
"""Operations that may stand between a projection and attention and treat every head alike."""


def _head_group(program: Program, node: fx.Node) -> Group:
    sizes = program.contract.sizes(PROBE)
    heads, kv_heads = (shape_at(program, node.args[place], sizes)[1] for place in (0, 1))
    share = heads // kv_heads
    rows: dict[fx.Node, list[Tensor]] = {}
    views: list[tuple[fx.Node, int]] = []
    for place, per_unit in ((0, share), (1, 1), (2, 1)):
        path = _path(node.args[place])
        numbers = Rows(program, path[-1], PASSING)
        found = numbers.at(node.args[place])
        if found is None:
            raise _NoGroupError("the rows of a projection cannot be followed")
        units = [_constant_rows(found[:, first : first + per_unit]) for first in range(0, found.shape[1], per_unit)]
        rows.setdefault(path[-1], []).append(torch.stack(units))
        views += _literal_views(path, numbers, units, (path[0], node))
    reader, columns, down = _reader(program, node, share)
    members = [Member(Operand(reader, 1, 1), columns)]
    for maker, parts in rows.items():
        places = torch.cat(parts, 1)
        if len(places.flatten().unique()) != len(places.flatten()):
            raise _NoGroupError("heads share rows of a projection")
        if places.numel() != maker.meta["val"].shape[-1]:
            raise _NoGroupError("a projection has rows that belong to no head")
        members += [Member(operand, places) for operand in _rows(maker)]
    per_head = torch.arange(heads).view(kv_heads, share)
    for position, name in ((6, "ALiBi slopes"), (7, "sinks")):
        constant = node.args[position] if len(node.args) > position else None
        if constant is not None:
            if constant.op != "get_attr":
                raise _NoGroupError(f"the {name} are computed")
            members.append(Member(Operand(node, position, 0), per_head))
    bias = node.args[5] if len(node.args) > 5 else None
    if bias is not None and shape_at(program, bias, sizes)[-3:-2] != (1,):
        raise _NoGroupError("a bias differs between heads")
    return Group(str(reader.args[1].target), tuple(members), reader.args[0], tuple(dict.fromkeys([*views, *down])))


def _path(source: Any) -> list[fx.Node]:
    """The nodes from an argument of attention up to the projection that makes it."""
    path = [source]
    while not _is_linear(path[-1]):
        node = path[-1]
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            if not isinstance(node.args[1], (int, float)):
                raise _NoGroupError(f"{node.name} multiplies heads by a tensor")
        elif node.target in (rms_norm.target, aten.layer_norm.default):
            if node.meta["val"].dim() != 4:
                raise _NoGroupError(f"{node.name} normalizes over heads")
        elif node.target not in REARRANGING and node.target not in PASSING:
            raise _NoGroupError(f"{node.name} stands between a projection and attention")
        path.append(node.args[0])
    return path


def _constant_rows(found: Tensor) -> Tensor:
    """The rows [n] in a part [B, n, S, D] that must not differ between batch and positions."""
    if not (found == found[:1, :, :1]).all():
        raise _NoGroupError("rows differ between tokens")
    return found[0, :, 0].flatten()


def _literal_views(
    path: Sequence[fx.Node], numbers: Rows, units: list[Tensor], ends: tuple[fx.Node, fx.Node]
) -> list[tuple[fx.Node, int]]:
    """Reshapes on a path with the places of sizes that count heads, where they are literal."""
    owner = torch.full((numbers.count,), -1)
    for unit, places in enumerate(units):
        owner[places] = unit
    found = []
    for node in path:
        values = numbers.at(node)
        if values is None:
            raise _NoGroupError(f"rows cannot be followed through {node.name}")
        found += _head_sizes(node, owner[values])
    return found


def _head_sizes(node: fx.Node, owner: Tensor) -> list[tuple[fx.Node, int]]:
    """Places of literal sizes of a reshape along whose axis `owner`, the unit of each element, changes."""
    if len(owner.unique()) == 1:
        return []
    axes = [axis for axis in range(owner.dim()) if (owner != owner.narrow(axis, 0, 1)).any()]
    if node.target in (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        axis = int(node.args[1 if node.target is aten.slice.Tensor else 2]) if len(node.args) > 2 else 0
        if axis % owner.dim() in axes:
            raise _NoGroupError(f"{node.name} takes a part of the heads")
    if node.target not in VIEWS:
        return []
    sizes = node.args[1]
    return [(node, axis) for axis in axes if isinstance(sizes[axis], int) and sizes[axis] != -1]


def _reader(program: Program, node: fx.Node, share: int) -> tuple[fx.Node, Tensor, list[tuple[fx.Node, int]]]:
    """The linear layer that reads an attention's result, its columns by unit, and the reshapes in between."""
    sizes = program.contract.sizes(PROBE)
    batch, heads, length, width = shape_at(program, node, sizes)
    numbers = Rows(program, node, PASSING)
    numbers.known[node] = torch.arange(heads * width).view(1, heads, 1, width).expand(batch, -1, length, -1)
    current, views = node, []
    while True:
        users = [user for user in current.users if user.target not in SIZES]
        if len(users) != 1:
            raise _NoGroupError(f"{current.name} has {len(users)} readers")
        if _is_linear(users[0]) and users[0].args[0] is current:
            break
        current = users[0]
        if current.target not in REARRANGING:
            raise _NoGroupError(f"{current.name} stands between attention and its projection")
        values = numbers.at(current)
        if values is None:
            raise _NoGroupError(f"heads cannot be followed through {current.name}")
        views += _head_sizes(current, values // (width * share))
    columns = numbers.of(current)
    if columns is None or len(columns.unique()) != heads * width:
        raise _NoGroupError("the output projection does not read each head once")
    return users[0], columns.argsort().view(heads // share, -1), views


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
