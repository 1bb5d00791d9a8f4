"""Attention of many queries in vector registers.

Rows (queries of all heads that share a key-value head) lie across vector lanes, so softmax needs no reduction across
lanes and keys need no transposition; blocks of keys that no row of a task can see are skipped (FlashAttention-2, Dao
2023, arXiv:2307.08691).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from graphwright.kernels.tir import attention
from graphwright.kernels.tir.attention import (
    LOWEST,
    Attention,
    Buffers,
    Operands,
    any_seen,
    key_range,
    score_of,
    visible,
)
from graphwright.kernels.tir.emit import (
    LANES,
    Flat,
    Layout,
    T,
    ceil_div,
    floats,
    let,
    local,
    loop,
    minimum,
    splat,
    widest,
)
from graphwright.kernels.tir.functions import constant, exp

KEY_BLOCK = 32
"""Keys of one step of the online softmax."""

WIDE, NARROW = (4, 4), (2, 2)
"""Vectors of 16 rows that a task computes, and keys or channels that it goes through at a time.

Sums of all of them stay in registers: of 16 floats, or as many floats in others.
"""


def prefill(a: Attention, o: Operands, parts: int, lanes: int = LANES) -> tirx.PrimFunc:
    """The kernel for any number of queries; writes out [B, S, H, Dv].

    Args:
        a: the attention.
        o: where its tensors lie.
        parts: those of `attention.decode`.
        lanes: floats in a register; those of 16 are taken to be 32.
    """
    block = WIDE if lanes == LANES else NARROW
    return attention.prefill(partial(_tasks, block), a, o, parts)


def _tasks(block: tuple[int, int], b: Buffers, batch: Any, rows: Any) -> None:
    width = 16 * block[0]
    blocks = let(ceil_div(rows, width))
    kv_heads = b.a.kv_heads
    with T.parallel(0, batch * kv_heads * blocks) as task:
        sequence, head = let(task // (blocks * kv_heads)), let(task // blocks % kv_heads)
        _Rows(b, block, sequence, head, let(task % blocks * width), rows).emit()


class _Rows:
    """Rows that one task computes: consecutive (query, head) pairs of one key-value head, across vector lanes."""

    def __init__(self, b: Buffers, block: tuple[int, int], sequence: Any, head: Any, first: Any, rows: Any) -> None:
        self.b, self.a, self.o = b, b.a, b.o
        self.sequence, self.head, self.first, self.rows = sequence, head, first, rows
        self.vectors, self.step = block
        self.width = 16 * self.vectors
        self.query = local(self.a.head_dim * self.width, "float32")
        self.values = local(self.a.value_dim * self.width, "float32")
        self.weights = local(KEY_BLOCK * self.width, "float32")
        self.best, self.total = local(self.width, "float32"), local(self.width, "float32")
        self.fade = local(self.width, "float32")
        self.positions = local(self.width, "int32")
        self.slopes = local(self.width, "float32") if b.slopes is not None else None
        self.range = local(2, "int32")
        widths = [
            size
            for buffer, size in ((b.key, self.a.head_dim), (b.value, self.a.value_dim))
            if buffer.dtype != "float32"
        ]
        self.floats = local(KEY_BLOCK * max(widths), "float32") if widths else None

    def emit(self) -> None:
        """The task."""
        self._gather()
        keys = self.o.key.shape[2]
        with loop(ceil_div(keys, KEY_BLOCK)) as block:
            start = let(block * KEY_BLOCK)
            positions = self.b.key_positions(self.sequence, start, KEY_BLOCK)
            with T.If(self._worth_it(positions)), T.Then():
                self._scores(start)
                self._softmax(positions)
                self._accumulate(start)
        self._scatter()

    def _row(self, i: Any) -> tuple[Any, Any]:
        """(query, head) of lane i; lanes beyond the last row repeat it."""
        row = let(minimum(self.first + i, self.rows - 1))
        return let(row // self.a.group), let(self.head * self.a.group + row % self.a.group)

    def _gather(self) -> None:
        a, first, last = self.a, tirx.const(2**31 - 1, "int32"), tirx.const(-(2**31), "int32")
        self.range.put(0, first, 1)
        self.range.put(1, last, 1)
        with loop(self.width) as i:
            place, head = self._row(i)
            start = let(self.o.query.at(self.sequence, head, place))
            with loop(a.head_dim) as d:
                self.query.put(d * self.width + i, self.b.query[start + d] * tirx.const(a.scale, "float32"), 1)
            position = let(self.b.query_position(self.sequence, place))
            self.positions.put(i, position, 1)
            self.range.put(0, T.min(self.range[0], position), 1)
            self.range.put(1, T.max(self.range[1], position), 1)
            if self.slopes is not None:
                self.slopes.put(i, self.b.slopes[head], 1)
        for at in range(0, self.width, 16):
            self.best.put(at, constant(LOWEST, 16))
            self.total.put(at, constant(0.0, 16))
        with loop(a.value_dim * self.vectors) as i:
            self.values.put(i * 16, constant(0.0, 16))

    def _worth_it(self, positions: Flat) -> Any:
        """Whether any row can see any key of the block, by the ranges of their positions."""
        return any_seen(self.a, key_range(positions, KEY_BLOCK), self.range[0], self.range[1])

    def _scores(self, start: Any) -> None:
        """weights[key, row] = key · query; a few keys and all rows at a time."""
        a, step = self.a, self.step
        keys, begin = self._as_floats(self.b.key, self.o.key, a.head_dim, start)
        with loop(KEY_BLOCK // step) as part:
            sums = local(step * self.width, "float32")
            for i in range(step * self.vectors):
                sums.put(i * 16, constant(0.0, 16))
            last = self.o.key.shape[2] - 1
            places = [let(minimum(start + part * step + i, last)) for i in range(step)]
            starts = [let(begin(part * step + i)) for i in range(step)]
            scales = self.b.scales("key", self.sequence, self.head, places)
            with loop(a.head_dim) as d:
                rows = [let(self.query.vec(d * self.width + 16 * v)) for v in range(self.vectors)]
                self._outer(sums, [keys[at + d] for at in starts], rows)
            for i in range(step * self.vectors):
                sum_ = sums.vec(i * 16)
                scaled = sum_ if scales is None else sum_ * splat(scales[i // self.vectors])
                self.weights.put(part * (step * self.width) + i * 16, scaled)

    def _as_floats(self, buffer: Flat, layout: Layout, width: int, start: Any) -> tuple[Flat, Callable[[Any], Any]]:
        """A block of keys or values as float32, and where each of them begins; floats stay where they are."""
        last = layout.shape[2] - 1

        def place(key: Any) -> Any:
            return layout.at(self.sequence, self.head, minimum(start + key, last))

        if self.floats is None or buffer.dtype == "float32":
            return buffer, place
        lanes = widest(width)
        with loop(KEY_BLOCK) as key:
            row = let(place(key))
            with loop(width // lanes) as i:
                self.floats.put(key * width + i * lanes, floats(buffer.vec(row + i * lanes, lanes), lanes), lanes)
        return self.floats, lambda key: key * width

    def _outer(self, sums: Flat, left: list[Any], right: list[Any]) -> None:
        """sums[i, v] += left[i] * right[v]."""
        for i, scalar in enumerate(left):
            spread = let(splat(scalar))
            for v, vector in enumerate(right):
                place = i * self.width + 16 * v
                sums.put(place, sums.vec(place) + spread * vector)

    def _softmax(self, positions: Flat) -> None:
        """Scores become weights; the sums so far fade to the new largest score."""
        for v in range(self.vectors):
            at = 16 * v
            rows = let(self.positions.vec(at))
            slope = self.slopes.vec(at) if self.slopes is not None else None
            top = local(16, "float32")
            top.put(0, self.best.vec(at))
            with loop(KEY_BLOCK) as key:
                place = let(key * self.width + at)
                position = let(splat(positions[key]))
                score = score_of(self.a, self.weights.vec(place), position - rows, slope, 16)
                score = let(tirx.Select(visible(self.a, rows, position, 16), score, constant(LOWEST, 16)))
                self.weights.put(place, score)
                top.put(0, T.max(top.vec(0), score))
            best = let(top.vec(0))
            fade = exp(self.best.vec(at) - best, 16)
            self.fade.put(at, fade)
            self.best.put(at, best)
            sums = local(16, "float32")
            sums.put(0, self.total.vec(at) * fade)
            with loop(KEY_BLOCK) as key:
                place = let(key * self.width + at)
                score = let(self.weights.vec(place))
                hidden = score <= constant(LOWEST / 2, 16)
                weight = let(tirx.Select(hidden, constant(0.0, 16), exp(score - best, 16)))
                self.weights.put(place, weight)
                sums.put(0, sums.vec(0) + weight)
            self.total.put(at, sums.vec(0))

    def _accumulate(self, start: Any) -> None:
        """values[channel, row] += value · weights; a few channels and all rows at a time."""
        step = self.step if self.a.value_dim % self.step == 0 else 1
        values, begin = self._as_floats(self.b.value, self.o.value, self.a.value_dim, start)
        self._scale_weights(start)
        with loop(self.a.value_dim // step) as part:
            sums = local(step * self.width, "float32")
            for i in range(step):
                for v in range(self.vectors):
                    place = (part * step + i) * self.width + 16 * v
                    sums.put(i * self.width + 16 * v, self.values.vec(place) * self.fade.vec(16 * v))
            with loop(KEY_BLOCK) as key:
                at = let(begin(key) + part * step)
                rows = [let(self.weights.vec(key * self.width + 16 * v)) for v in range(self.vectors)]
                self._outer(sums, [values[at + i] for i in range(step)], rows)
            for i in range(step * self.vectors):
                self.values.put(part * (step * self.width) + i * 16, sums.vec(i * 16))

    def _scale_weights(self, start: Any) -> None:
        """Multiplies weights by the scales of values that are codes."""
        scale, layout = self.b.value_scale, self.o.value_scale
        if scale is None or layout is None:
            return
        with loop(KEY_BLOCK) as key:
            place = let(minimum(start + key, self.o.value.shape[2] - 1))
            factor = let(splat(scale[layout.at(self.sequence, self.head, place, 0)]))
            for v in range(self.vectors):
                at = key * self.width + 16 * v
                self.weights.put(at, self.weights.vec(at) * factor)

    def _scatter(self) -> None:
        a, one, none = self.a, tirx.const(1.0, "float32"), tirx.const(0.0, "float32")
        with loop(minimum(self.rows - self.first, tirx.const(self.width, "int64"))) as i:
            place, head = self._row(i)
            total: Any = self.total[i]
            scale: Any = one
            if self.b.sinks is not None:
                top = let(T.max(self.best[i], self.b.sinks[head]))
                scale = exp(self.best[i] - top, 1)
                total = total * scale + exp(self.b.sinks[head] - top, 1)
            total = let(total)
            factor = let(T.Select(total > none, scale / total, none))
            target = let(((self.sequence * self.o.query.shape[2] + place) * a.heads + head) * a.value_dim)
            with loop(a.value_dim) as d:
                self.b.out.put(target + d, self.values[d * self.width + i] * factor, 1)
