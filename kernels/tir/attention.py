"""Attention by positions with an online softmax: what it is, one query, few queries, and what masks let through.

`decode`: one query. Keys are cut into parts that threads share, and the parts' softmaxes are merged at the end
(Flash-Decoding, Dao et al. 2023); query heads that share a key-value head read it once.

`prefill`: any number. Few queries of each sequence, as when several sequences decode or guesses are verified, are
taken one by one as in `decode`, with the same parts in the same order, so that a token's result is the same to the bit
whether it comes alone or not. Parts take blocks of keys in turn, so that the room in the cache does not matter either,
and where there is a window, parts share the blocks that are seen. What becomes of many queries is for another file to
say: `attention_vectors` for every machine, `attention_tiles` for tile registers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Flat,
    Kernel,
    Layout,
    T,
    ceil_div,
    floats,
    kernel,
    let,
    local,
    loop,
    minimum,
    parallel,
    reduce_add,
    reduce_max,
    splat,
    widest,
)  # fmt: skip
from graphwright.kernels.tir.functions import constant, exp, integer, kind, tanh

KEYS = 16
"""Keys of one step of the online softmax."""

FEW = 8
"""Queries of a sequence that are taken one by one."""

LOWEST = -1e30
"""A score below all scores; exp(LOWEST - x) is 0 for every score x."""


@dataclass(frozen=True)
class Attention:
    """An attention to make a kernel for; the options are those of `graphwright.ops.attention`."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool
    window: int = 0
    chunk: int = 0
    prefix: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    anchors: int = 0
    block: int = 0

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Operands:
    """Where an attention's tensors lie; positions that are None count from 0.

    Keys and values with a scale, [B, Hkv, T, 1], are int8 codes; others are float32, or float16 where that is said.
    """

    query: Layout
    key: Layout
    value: Layout
    query_positions: Layout | None
    key_positions: Layout | None
    key_scale: Layout | None = None
    value_scale: Layout | None = None
    key_dtype: str = "float32"
    value_dtype: str = "float32"


class Buffers:
    """The kernel's arguments, in the order in which it takes them."""

    def __init__(self, k: Kernel, a: Attention, o: Operands, parts: int) -> None:
        self.a, self.o = a, o
        self.query = k.read("query", o.query.base, "float32")
        self.key = k.read("key", o.key.base, "int8" if o.key_scale else o.key_dtype)
        self.value = k.read("value", o.value.base, "int8" if o.value_scale else o.value_dtype)
        self.key_scale = k.read("key_scale", o.key_scale.base, "float32") if o.key_scale else None
        self.value_scale = k.read("value_scale", o.value_scale.base, "float32") if o.value_scale else None
        self.query_at = k.read("query_positions", o.query_positions.base, "int64") if o.query_positions else None
        self.key_at = k.read("key_positions", o.key_positions.base, "int64") if o.key_positions else None
        self.slopes = k.read("alibi_slopes", (a.heads,), "float32") if a.alibi else None
        self.sinks = k.read("sinks", (a.heads,), "float32") if a.sinks else None
        batch, _, length, _ = o.query.shape
        self.out = k.write("out", (batch, length, a.heads, a.value_dim), "float32")
        # Per part and head: unnormalised values, then the largest score and the sum of weights.
        part_shape = (batch, a.kv_heads, parts, a.group, a.value_dim + 2)
        self.parts = k.write("parts", part_shape, "float32") if parts else None
        k.begin()

    def query_position(self, batch: Any, place: Any) -> Any:
        """Position of a query, int32."""
        if self.query_at is None or self.o.query_positions is None:
            return tirx.Cast("int32", place)
        return tirx.Cast("int32", self.query_at[self.o.query_positions.at(batch, place)])

    def key_positions(self, batch: Any, first: Any, count: int) -> Flat:
        """Positions of `count` keys from `first` on, int32; -1 beyond the last key."""
        keys = self.o.key.shape[2]
        positions = local(count, "int32")
        with loop(count) as i:
            place = let(first + i)
            known: Any = tirx.Cast("int32", place)
            if self.key_at is not None and self.o.key_positions is not None:
                safe = minimum(place, keys - 1)
                known = tirx.Cast("int32", self.key_at[self.o.key_positions.at(batch, safe)])
            positions.put(i, T.Select(place < keys, known, tirx.const(-1, "int32")), 1)
        return positions

    def scales(self, kind: str, batch: Any, head: Any, places: list[Any]) -> Flat | None:
        """Scales of the keys or values at `places`; None where they are no codes."""
        buffer, layout = (self.key_scale, self.o.key_scale) if kind == "key" else (self.value_scale, self.o.value_scale)
        if buffer is None or layout is None:
            return None
        found = local(len(places), "float32")
        for i, place in enumerate(places):
            found.put(i, buffer[layout.at(batch, head, place, 0)], 1)
        return found


def decode(a: Attention, o: Operands, parts: int) -> tirx.PrimFunc:
    """The kernel for one query per sequence; writes out [B, 1, H, Dv] and scratch [B, Hkv, parts, group, Dv + 2]."""
    batch = o.query.shape[0]
    with kernel("attention_decode") as k:
        b = Buffers(k, a, o, parts)
        with parallel(batch * (a.kv_heads * parts)) as task:
            row = let(task // (a.kv_heads * parts))
            head, part = let(task // parts % a.kv_heads), let(task % parts)
            _decode_part(b, row, 0, head, _blocks_of(b, part, parts), b.parts, task * a.group)
        with parallel(batch) as row, loop(a.heads) as head:
            group = let((row * a.kv_heads + head // a.group) * parts * a.group)
            _merge(b, row, 0, head, parts, b.parts, group)
    return k.function


def _blocks_of(b: Buffers, part: Any, parts: int) -> tuple[Any, int, Any]:
    """The first block of keys of a part, how far its blocks are apart, and their number."""
    blocks = ceil_div(b.o.key.shape[2], KEYS)
    return part, parts, let(ceil_div(blocks - part, parts))


@contextmanager
def _if_seen(b: Buffers, row: Any, start: Any, query_position: Any) -> Iterator[Flat]:
    """Positions of a block of keys from `start` on; what is emitted runs if window and chunk let the query see any."""
    positions = b.key_positions(row, start, KEYS)
    if not b.a.window and not b.a.chunk:
        yield positions
        return
    smallest, largest = key_range(positions, KEYS)
    near = _near_range(b.a, smallest, largest, query_position, query_position)
    with T.If(tirx.And(largest >= tirx.const(0, "int32"), near)), T.Then():
        yield positions


def key_range(positions: Flat, lanes: int) -> tuple[Any, Any]:
    """Smallest position that is not padding, and largest of all."""
    keys = positions.vec(0, lanes)
    low = tirx.Select(keys >= integer(0, lanes), keys, integer(2**31 - 1, lanes))
    name = f"v{lanes}i32"
    smallest = let(tirx.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.smin.{name}", low))
    return smallest, let(tirx.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.smax.{name}", keys))


def _decode_part(
    b: Buffers, row: Any, place: Any, head: Any, share: tuple[Any, int, Any], held: Flat, line: Any
) -> None:
    """One query's share of the blocks of keys, for the query heads of one key-value head.

    Args:
        b: the arguments.
        row: the sequence.
        place: the query's.
        head: of keys and values.
        share: first block, distance of blocks, number of blocks.
        held: where results go, Dv + 2 numbers a line.
        line: the first one.
    """
    a, o = b.a, b.o
    first, stride, count = share
    lanes, width = widest(a.head_dim), widest(a.value_dim)
    query = local(a.group * a.head_dim, "float32")
    values = local(a.group * a.value_dim, "float32")
    best, total, weights = local(a.group, "float32"), local(a.group, "float32"), local(KEYS, "float32")
    with loop(a.group) as g:
        start = let(o.query.at(row, head * a.group + g, place))
        with loop(a.head_dim // lanes) as i:
            scaled = b.query.vec(start + i * lanes, lanes) * constant(a.scale, lanes)
            query.put(g * a.head_dim + i * lanes, scaled, lanes)
        best.put(g, tirx.const(LOWEST, "float32"), 1)
        total.put(g, tirx.const(0.0, "float32"), 1)
        with loop(a.value_dim // width) as i:
            values.put(g * a.value_dim + i * width, constant(0.0, width), width)
    # Through memory: TVM takes minutes to simplify masks if it sees how the position follows from the task.
    asked = local(1, "int32")
    asked.put(0, b.query_position(row, place), 1)
    query_position = let(asked[0])
    with (
        loop(count) as step,
        _if_seen(b, row, start := let((first + step * stride) * KEYS), query_position) as positions,
    ):
        places = [let(minimum(start + i, o.key.shape[2] - 1)) for i in range(KEYS)]
        key_rows = [let(o.key.at(row, head, place)) for place in places]
        value_rows = [let(o.value.at(row, head, place)) for place in places]
        # Codes and halves become floats once, for all the query heads that read them; scales come per key afterwards.
        key_scales, value_scales = (b.scales(kind, row, head, places) for kind in ("key", "value"))
        keys, key_rows = _floats(b.key, key_rows, a.head_dim)
        plain, value_rows = _floats(b.value, value_rows, a.value_dim)
        with loop(a.group) as g:
            for i, key_row in enumerate(key_rows):
                dot: Any = None
                for at in range(0, a.head_dim, lanes):
                    term = query.vec(g * a.head_dim + at, lanes) * keys.vec(key_row + at, lanes)
                    dot = term if dot is None else dot + term
                weights.put(i, reduce_add(dot, lanes), 1)
            slope = splat(b.slopes[head * a.group + g], KEYS) if b.slopes is not None else None
            key_vec = let(positions.vec(0, KEYS))
            distance = key_vec - splat(query_position, KEYS)
            seen = visible(a, splat(query_position, KEYS), key_vec, KEYS)
            dots = weights.vec(0, KEYS) if key_scales is None else weights.vec(0, KEYS) * key_scales.vec(0, KEYS)
            score = let(tirx.Select(seen, score_of(a, dots, distance, slope, KEYS), constant(LOWEST, KEYS)))
            top = let(T.max(best[g], reduce_max(score, KEYS)))
            fade = exp(best[g] - top, 1)
            weight = let(tirx.Select(seen, exp(score - splat(top, KEYS), KEYS), constant(0.0, KEYS)))
            weights.put(0, weight if value_scales is None else weight * value_scales.vec(0, KEYS), KEYS)
            best.put(g, top, 1)
            total.put(g, total[g] * fade + reduce_add(weight, KEYS), 1)
            with loop(a.value_dim // width) as at:
                start_ = let(g * a.value_dim + at * width)
                sum_: Any = values.vec(start_, width) * splat(fade, width)
                for i, value_row in enumerate(value_rows):
                    sum_ = sum_ + splat(weights[i], width) * plain.vec(value_row + at * width, width)
                values.put(start_, sum_, width)
    with loop(a.group) as g:
        target = let((line + g) * (a.value_dim + 2))
        with loop(a.value_dim // width) as at:
            held.put(target + at * width, values.vec(g * a.value_dim + at * width, width), width)
        held.put(target + a.value_dim, best[g], 1)
        held.put(target + a.value_dim + 1, total[g], 1)


def _floats(buffer: Flat, rows: list[Any], width: int) -> tuple[Flat, list[Any]]:
    """Rows of `width` values as float32, and where each begins; floats stay where they are."""
    if buffer.dtype == "float32":
        return buffer, rows
    lanes = widest(width)
    made = local(len(rows) * width, "float32")
    for i, row in enumerate(rows):
        for at in range(0, width, lanes):
            made.put(i * width + at, floats(buffer.vec(row + at, lanes), lanes), lanes)
    return made, [i * width for i in range(len(rows))]


def _merge(b: Buffers, row: Any, place: Any, head: Any, parts: int, held: Flat, group: Any) -> None:
    """The output of one head of a query from the parts that its keys were cut into.

    Args:
        b: the arguments.
        row: the sequence.
        place: the query's.
        head: of queries.
        parts: number of them.
        held: their results.
        group: line of the first result of the first part.
    """
    a, width = b.a, widest(b.a.value_dim)
    starts = [let((group + part * a.group + head % a.group) * (a.value_dim + 2)) for part in range(parts)]
    top: Any = b.sinks[head] if b.sinks is not None else tirx.const(LOWEST, "float32")
    for at in starts:
        top = T.max(top, held[at + a.value_dim])
    top = let(top)
    total: Any = exp(b.sinks[head] - top, 1) if b.sinks is not None else tirx.const(0.0, "float32")
    fades = [exp(held[at + a.value_dim] - top, 1) for at in starts]
    for at, fade in zip(starts, fades, strict=True):
        total = total + fade * held[at + a.value_dim + 1]
    total = let(total)
    factor = let(
        T.Select(total > tirx.const(0.0, "float32"), tirx.const(1.0, "float32") / total, tirx.const(0.0, "float32"))
    )
    out = let(((row * b.o.query.shape[2] + place) * a.heads + head) * a.value_dim)
    with loop(a.value_dim // width) as i:
        value: Any = constant(0.0, width)
        for at, fade in zip(starts, fades, strict=True):
            value = value + splat(fade, width) * held.vec(at + i * width, width)
        b.out.put(out + i * width, value * splat(factor, width), width)


def prefill(many: Callable[["Buffers", Any, Any], None], a: Attention, o: Operands, parts: int) -> tirx.PrimFunc:
    """The kernel for any number of queries; writes out [B, S, H, Dv].

    Args:
        many: emits what becomes of more than a few, given the arguments, the batch size and the number of rows.
        a: the attention.
        o: where its tensors lie.
        parts: those of `decode`.
    """
    batch, _, length, _ = o.query.shape
    with kernel("attention_prefill") as k:
        b = Buffers(k, a, o, 0)
        with T.If(length <= tirx.const(FEW, "int64")):
            with T.Then():
                _one_by_one(b, batch, length, parts)
            with T.Else():
                many(b, batch, let(length * a.group))
    return k.function


def _one_by_one(b: Buffers, batch: Any, length: Any, parts: int) -> None:
    """Every query and key-value head is a task, which goes through all parts of the keys."""
    a = b.a
    with T.parallel(0, batch * length * a.kv_heads) as task:
        row, place = let(task // (length * a.kv_heads)), let(task // a.kv_heads % length)
        head = let(task % a.kv_heads)
        held = local(parts * a.group * (a.value_dim + 2), "float32")
        with loop(parts) as part:
            _decode_part(b, row, place, head, _blocks_of(b, part, parts), held, part * a.group)
        with loop(a.group) as g:
            _merge(b, row, place, let(head * a.group + g), parts, held, 0)


def score_of(a: Attention, product: Any, distance: Any, slope: Any, lanes: int) -> Any:
    """A scaled product with softcap and alibi; `distance` is key minus query position."""
    score = product
    if a.softcap:
        score = tanh(score * constant(1.0 / a.softcap, lanes), lanes) * constant(a.softcap, lanes)
    if slope is not None:
        score = score + slope * tirx.Cast(kind("float32", lanes), distance)
    return score


def visible(a: Attention, query: Any, key: Any, lanes: int) -> Any:
    """Which keys rows may see, by the rule of `graphwright.ops.attention`."""
    conditions: list[Any] = [key >= integer(0, lanes), query >= integer(0, lanes)]
    if a.causal:
        before = key <= query
        conditions.append(tirx.Or(before, key < integer(a.prefix, lanes)) if a.prefix else before)
    near: list[Any] = []
    if a.window:
        size, reach = integer(max(a.block, 1), lanes), integer(a.window // max(a.block, 1), lanes)
        apart = T.truncdiv(query, size) - T.truncdiv(key, size) if a.block else query - key
        near += [apart < reach, -apart < reach]
    if a.chunk:
        size = integer(a.chunk, lanes)
        near.append(T.truncdiv(query, size) == T.truncdiv(key, size))
    if near and a.anchors:
        count = integer(a.anchors, lanes)
        near = [tirx.Or(_all(near), tirx.Or(key < count, query < count))]
    return _all(conditions + near)


def any_seen(a: Attention, keys: tuple[Any, Any], first: Any, last: Any) -> Any:
    """Whether a query between two positions can see any key of a `key_range`; never too few."""
    smallest, largest = keys
    some = largest >= tirx.const(0, "int32")
    if a.causal:
        reach = smallest <= last
        some = tirx.And(some, tirx.Or(reach, smallest < tirx.const(a.prefix, "int32")) if a.prefix else reach)
    near = _near_range(a, smallest, largest, first, last)
    return some if near is None else tirx.And(some, near)


def _near_range(a: Attention, smallest: Any, largest: Any, first: Any, last: Any) -> Any:
    """Whether window and chunk let a query from `first` to `last` see a key from `smallest` to `largest`.

    Never too few. Scalars; a block of the window lies within as many single positions.
    """
    near: list[Any] = []
    if a.window:
        reach = tirx.const(a.window, "int32")
        near += [largest > first - reach, smallest < last + reach]
    if a.chunk:
        size = tirx.const(a.chunk, "int32")
        near += [
            T.truncdiv(largest, size) >= T.truncdiv(first, size),
            T.truncdiv(smallest, size) <= T.truncdiv(last, size),
        ]
    if not near:
        return None
    if a.anchors:
        count = tirx.const(a.anchors, "int32")
        return tirx.Or(_all(near), tirx.Or(smallest < count, first < count))
    return _all(near)


def _all(conditions: list[Any]) -> Any:
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = tirx.And(seen, condition)
    return seen
