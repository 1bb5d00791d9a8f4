"""KIVI caches as what has kernels: attention reads codes, residual and new tokens where they lie.

    before                                               after
    keys = kivi_read(codes, …, k, positions, T)          spans = token_spans(positions)      once for all layers
    kivi_update(codes, …, k, positions)                  y = attend_kivi_cache(q, codes, …, k, …, spans, T)
    values = kivi_read(…, v, positions, T)               kivi_cache_update(codes, …, k, positions, spans)
    kivi_update(…, v, positions)                         kivi_cache_update(…, v, positions, spans)
    y = attention(q, keys, values, …)

New tokens read the past as it was before them, so the updates move behind the attention. Where something else reads a
cache too, reads and updates are calls of their own: `read_kivi_cache`.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright import ops as semantic
from graphwright.backends.triton import kivi_ops
from graphwright.backends.triton.caches import FLOATS, head_refusal
from graphwright.kernels.triton.kivi import LARGEST_GROUP
from graphwright.match import argument
from graphwright.program import Program
from graphwright.rewrite import Editor

OPS = (semantic.kivi_read.target, semantic.kivi_update.target)
STATE = ("codes", "scale", "zero", "residual", "new")


@dataclass(frozen=True)
class Layer:
    """An attention that alone reads two KIVI caches, and what writes them afterwards."""

    key: fx.Node
    value: fx.Node
    updates: tuple[fx.Node, ...]


def refusal(node: fx.Node) -> str:
    """Why no kernel serves a call of an op of KIVI caches; empty if one does."""
    new, residual = (node.args[STATE.index(name)].meta["val"] for name in ("new", "residual"))
    if new.dtype not in FLOATS or residual.dtype != new.dtype:
        return f"no kernel reads a residual in {residual.dtype} beside new tokens in {new.dtype}"
    group = argument(node, "group_size")
    return "" if group <= LARGEST_GROUP else f"KIVI groups of {group} have no kernel; there are up to {LARGEST_GROUP}"


def layer_of(node: fx.Node) -> Layer | None:
    """The caches of an attention that its kernel reads where they lie; None where it reads something else."""
    key, value = node.args[1:3]
    if any(side.target is not semantic.kivi_read.target or len(side.users) != 1 for side in (key, value)):
        return None
    if any(refusal(side) for side in (key, value)) or head_refusal(node):
        return None
    if not argument(key, "per_channel") or argument(value, "per_channel"):
        return None
    if any(argument(key, name) != argument(value, name) for name in ("positions", "keys")):
        return None
    windows = [side.args[3].meta["val"].shape[2] for side in (key, value)]
    kinds = {part.meta["val"].dtype for part in (node.args[0], key, value)}
    if windows[0] != windows[1] or len(kinds) != 1:
        return None
    updates = [_update_of(side, node) for side in (key, value)]
    return None if None in updates else Layer(key, value, tuple(u for u in updates if u is not None))


def in_place(program: Program, editor: Editor) -> None:
    """Lowers every call that a kernel serves."""
    served = [node for node in program.calls(*OPS) if not refusal(node)]
    spans: dict[fx.Node, fx.Node] = {}
    for node in served:
        positions = argument(node, "positions")
        if positions not in spans:
            spans[positions] = editor.call(kivi_ops.token_spans.target, positions, before=node)
    for node in program.calls(semantic.attention.target):
        found = layer_of(node)
        if found is not None:
            _attend(editor, node, found, spans)
    program.graph.eliminate_dead_code()
    for node in served:
        if node.target is semantic.kivi_update.target:
            arguments = [argument(node, name) for name in ("bits", "group_size", "per_channel")]
            positions = argument(node, "positions")
            made = (*node.args[:5], positions, spans[positions], *arguments)
            editor.call(kivi_ops.kivi_cache_update.target, *made, before=node)
            editor.note(node, "")
            program.graph.erase_node(node)
        elif node.users:
            arguments = [argument(node, name) for name in ("keys", "bits", "group_size", "per_channel")]
            positions = argument(node, "positions")
            made = (*node.args[:5], positions, spans[positions], *arguments)
            editor.replace(node, editor.call(kivi_ops.read_kivi_cache.target, *made, before=node))


def _attend(editor: Editor, node: fx.Node, layer: Layer, spans: dict[fx.Node, fx.Node]) -> None:
    names = [formal.name for formal in node.target._schema.arguments][3:]
    options = [argument(node, name) for name in names]
    positions, keys = (argument(layer.key, name) for name in ("positions", "keys"))
    sizes = [argument(side, name) for side in (layer.key, layer.value) for name in ("bits", "group_size")]
    states = (*layer.key.args[:5], *layer.value.args[:5])
    made = (node.args[0], *states, positions, spans[positions], keys, *sizes, *options)
    new = editor.call(kivi_ops.attend_kivi_cache.target, *made, before=node)
    editor.replace(node, new)
    for update in layer.updates:
        node.append(update)


def _update_of(read: fx.Node, reader: fx.Node) -> fx.Node | None:
    """The update that follows a read, if nothing else touches its cache and the update can wait for `reader`."""
    codes: Any = read.args[0]
    others = [user for user in codes.users if user is not read]
    if len(others) != 1 or others[0].target is not semantic.kivi_update.target or not read < others[0]:
        return None
    same = all(others[0].args[place] is read.args[place] for place in range(len(STATE)))
    same = same and argument(others[0], "positions") is argument(read, "positions")
    alone = all(set(part.users) == {read, others[0]} for part in read.args[:4])
    return others[0] if same and alone and not others[0].users else None
