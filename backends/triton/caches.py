"""Paged and quantized caches as what has kernels: written in one pass, and read by attention where they lie.

    before                                               after
    codes, scale = quantize_tokens(rope(k, …), format)   quantized_cache_update(codes_cache, scale_cache, k, …)
    kv_cache_update(codes_cache, codes, slots)
    kv_cache_update(scale_cache, scale, slots)
    keys = dequantize_tokens(codes_cache[:T], …)         y = cached_attention(q, codes_cache[:T], scale_cache[:T], …)
    y = attention(q, keys, values, …)

In blocks `paged_update` and `paged_read` stand for the writes and slices. Whatever else reads such a cache, a ring of a
sliding window for one, reads it in floating point: `read_cache`.
"""

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from graphwright import ops as semantic
from graphwright.backends.triton import cache_ops
from graphwright.kernels.triton import cache_codes, flash_attention
from graphwright.match import argument
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

WRITES = (semantic.kv_cache_update.target, semantic.paged_update.target)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Held:
    """What a node reads of a cache.

    Attributes:
        codes: the codes or numbers, a slice of a cache in rows or a pool of blocks.
        scale: of codes, likewise.
        table: of blocks, or None.
        keys: how many slots.
        format: of codes, or empty.
    """

    codes: fx.Node
    scale: fx.Node | None
    table: fx.Node | None
    keys: Any
    format: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """What keys and values have to agree in."""
        return self.table, self.keys, self.format


@dataclass(frozen=True)
class Rounded:
    """A rounding whose codes and scales go to the same slots of two caches, and nowhere else."""

    codes: fx.Node
    scale: fx.Node

    @property
    def table(self) -> fx.Node | None:
        """Of blocks, or None."""
        return _table(self.codes)


def held(node: fx.Node) -> Held | None:
    """What a node reads of a cache that lies in blocks or codes; None for everything else."""
    if node.target == semantic.paged_read.target:
        pool, table, keys = node.args
        return Held(pool, None, table, keys, "")
    if node.target != semantic.dequantize_tokens.target:
        return None
    codes, scale, format, _ = node.args
    if all(part.target == semantic.paged_read.target for part in (codes, scale)):
        if codes.args[1:] != scale.args[1:]:
            return None
        pool, table, keys = codes.args
        return Held(pool, scale.args[0], table, keys, format)
    return Held(codes, scale, None, _value(codes).shape[2], format)


def attended(node: fx.Node) -> tuple[Held, Held] | None:
    """Keys and values of an attention that its kernel reads where they lie; None where it reads plain tensors."""
    key, value = held(node.args[1]), held(node.args[2])
    if key is None or value is None or key.kind != value.kind:
        return None
    if any(_value(side).dtype != _value(node.args[0]).dtype for side in node.args[1:3]):
        return None
    if any(_disturbed(state, node) for part in (key, value) for state in _states(part)):
        return None
    return key, value


def rounded(node: fx.Node) -> Rounded | None:
    """The writes of a rounding, if one kernel can make them all."""
    parts: dict[int, fx.Node] = {}
    for item in node.users:
        users = list(item.users)
        if item.target is not operator.getitem or len(users) != 1 or users[0].target not in WRITES:
            return None
        if users[0].args[1] is not item:
            return None
        parts[int(item.args[1])] = users[0]
    if len(parts) != 2 or parts[0].args[2:] != parts[1].args[2:] or parts[0].target is not parts[1].target:
        return None
    return Rounded(parts[0], parts[1])


def refusal(node: fx.Node) -> str:
    """Why no kernel serves a call of an op of caches; empty if one does."""
    if node.target == semantic.quantize_tokens.target:
        if node.args[1] not in cache_codes.FORMATS or _value(node.args[0]).dtype not in FLOATS:
            return f"no kernel rounds {_value(node.args[0]).dtype} to {node.args[1]}"
        return "" if rounded(node) else "its codes and scales do not go to the same slots of two caches, and only there"
    if node.target == semantic.dequantize_tokens.target:
        wanted = _value(node).dtype
        return "" if wanted in FLOATS else f"no kernel reads codes as {wanted}"
    return ""


def merge_writes(program: Program, editor: Editor) -> None:
    """Rotation, rounding and both writes become one call; so do rotation and the write into blocks."""
    for node in program.calls(semantic.quantize_tokens.target):
        found = rounded(node)
        if found is None or refusal(node):
            continue
        x, format = node.args
        source, rotation = _source(x)
        caches = (found.codes.args[0], found.scale.args[0])
        made = (*caches, source, found.codes.args[2], found.table, format, *rotation)
        # Nothing reads either cache between the two writes that a pass puts side by side.
        first = min(found.codes, found.scale)
        editor.call(cache_ops.quantized_cache_update.target, *made, before=first)
        for write in (found.codes, found.scale):
            editor.note(write, "")
            program.graph.erase_node(write)
    for node in program.calls(semantic.paged_update.target):
        pool, x, slots, table = node.args
        source, rotation = _source(x)
        editor.call(cache_ops.paged_cache_update.target, pool, source, slots, table, *rotation, before=node)
        editor.note(node, "")
        program.graph.erase_node(node)


def read_in_place(program: Program, editor: Editor) -> None:
    """Attention reads blocks and codes itself; other readers get what lies there in floating point."""
    for node in program.calls(semantic.attention.target):
        found = attended(node)
        if found is None or head_refusal(node):
            continue
        key, value = found
        names = [formal.name for formal in node.target._schema.arguments][3:]
        options = [argument(node, name) for name in names]
        caches = (key.codes, key.scale, value.codes, value.scale, key.table, _keys(editor, key, node), key.format)
        new = editor.call(cache_ops.cached_attention.target, node.args[0], *caches, *options, before=node)
        editor.replace(node, new)
    for target in (semantic.dequantize_tokens.target, semantic.paged_read.target):
        # What was read in place is not read here, nor blocks of codes that are read in floating point.
        program.graph.eliminate_dead_code()
        for node in program.calls(target):
            part = held(node)
            if part is None or refusal(node):
                continue
            keys = _keys(editor, part, node)
            arguments = (part.codes, part.scale, part.table, keys, part.format, _value(node).dtype)
            editor.replace(node, editor.call(cache_ops.read_cache.target, *arguments, before=node))


def head_refusal(node: fx.Node) -> str:
    """Why no attention kernel has the heads of a call; empty if one has."""
    largest = flash_attention.LARGEST_HEAD
    wide = max(_value(side).shape[3] for side in node.args[1:3])
    return "" if wide <= largest else f"head_dim {wide} has no kernel; there are kernels for 1 to {largest}"


def _keys(editor: Editor, part: Held, before: fx.Node) -> Any:
    """The number of slots as an argument: of rows it is the size of the slice."""
    if part.table is not None:
        return part.keys
    if isinstance(part.keys, int):
        return part.keys
    return editor.call(aten.sym_size.int, part.codes, 2, before=before)


def _source(x: fx.Node) -> tuple[fx.Node, tuple[Any, ...]]:
    """What is written, before its rotation where nobody else wants it rotated, and the rotation's arguments."""
    if x.target != semantic.rope.target or len(x.users) != 1 or _value(x).dtype not in FLOATS:
        return x, (None, None, 1.0, False)
    source, *rotation = (argument(x, name) for name in ("x", "positions", "inv_freq", "scaling", "interleaved"))
    return source, tuple(rotation)


def _table(write: fx.Node) -> Any:
    return write.args[3] if write.target == semantic.paged_update.target else None


def _states(part: Held) -> list[fx.Node]:
    sources = [source for source in (part.codes, part.scale) if source is not None]
    return [cast(fx.Node, source.args[0]) if source.target is aten.slice.Tensor else source for source in sources]


def _disturbed(state: fx.Node, reader: fx.Node) -> bool:
    """Whether a cache is written between where its values were read for `reader` and `reader` itself."""
    reads = [user for user in state.users if user.target not in WRITES]
    writes = [user for user in state.users if user.target in WRITES and user < reader]
    return any(not write < read for write in writes for read in reads)


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value
