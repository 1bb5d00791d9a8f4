"""Attention of many queries in the tile registers of AMX, with the accuracy of float32.

The registers multiply bfloat16. Each operand is cut into a bfloat16 and what is left of it as another one, x = h + l,
and x y is taken as h y_h + h y_l + l y_h: what is missing is below 2**-16 of the product.

    scores[key, row]      = key · query          left: keys as they lie,   right: queries, transposed once a task
    values[channel, row] += value^T · weights    left: values, transposed, right: weights as softmax makes them

As in `attention_vectors`, rows (queries of all heads that share a key-value head) lie across vector lanes, so softmax
needs no reduction across lanes. A task takes several blocks of rows, so that it cuts a block of keys and values once
for all of them; blocks that no row can see are skipped (FlashAttention-2, Dao 2023, arXiv:2307.08691).

One register holds 32 values along the summed dimension, in 16 words. Any order will do if both sides keep it: word j
holds value j and value j + 16, so that words are made from whole vectors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from graphwright.kernels.tir import amx, attention
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
from graphwright.kernels.tir.emit import Flat, T, ceil_div, floats, let, local, loop, minimum, splat
from graphwright.kernels.tir.functions import constant, exp, fma, rounded

KEY_BLOCK = 64
"""Keys of one step of the online softmax."""

WIDTH = 2 * amx.TILE
"""Rows of a block: the columns of two registers."""

BLOCKS = 8
"""Blocks of rows in a task."""

DEPTH = 2 * amx.TILE
"""Values along the summed dimension in a register."""

TILE_WORDS = amx.TILE * amx.TILE
"""Words of a register."""

PAIR = 2 * TILE_WORDS
"""Words of an operand's two parts: the larger one, then what is left."""

LOG2_E = 1.4426950408889634

EXP2_COEFFICIENTS = (1.0, 0.69314718, 0.24022107, 0.05550327, 0.00967604, 0.00134004)
"""Of a polynomial for 2 to the x on [-1/2, 1/2]."""

SCALE = "llvm.x86.avx512.mask.scalef.ps.512"
"""Multiplies by a power of two; every machine with these registers has it."""


def serves(a: Attention) -> bool:
    """Whether head sizes fill the registers."""
    return a.head_dim % amx.TILE == 0 and a.value_dim % amx.TILE == 0


def prefill(a: Attention, o: Operands, parts: int) -> tirx.PrimFunc:
    """The kernel for any number of queries; writes out [B, S, H, Dv]. `parts` are those of `attention.decode`."""
    return attention.prefill(_tasks, a, o, parts)


def _tasks(b: Buffers, batch: Any, rows: Any) -> None:
    share = WIDTH * BLOCKS
    shares, kv_heads = let(ceil_div(rows, share)), b.a.kv_heads
    with T.parallel(0, batch * kv_heads * shares) as task:
        sequence, head = let(task // (shares * kv_heads)), let(task // shares % kv_heads)
        _Task(b, sequence, head, let(task % shares * share), rows).emit()


class _Task:
    """Consecutive (query, head) pairs of one key-value head, in blocks of rows."""

    def __init__(self, b: Buffers, sequence: Any, head: Any, first: Any, rows: Any) -> None:
        self.b, self.a, self.o = b, b.a, b.o
        self.sequence, self.head, self.first, self.rows = sequence, head, first, rows
        self.blocks = let(minimum(ceil_div(rows - first, WIDTH), tirx.const(BLOCKS, "int64")))
        self.steps = ceil_div(self.a.head_dim, DEPTH)
        self.channels = self.a.value_dim // amx.TILE
        # Operands of products: [tiles, steps, 2 parts, 16, 16] words.
        self.query = local(BLOCKS * 2 * self.steps * PAIR, "uint32")
        self.key = local(KEY_BLOCK // amx.TILE * self.steps * PAIR, "uint32")
        self.value = local(self.channels * (KEY_BLOCK // DEPTH) * PAIR, "uint32")
        self.weight = local(2 * (KEY_BLOCK // DEPTH) * PAIR, "uint32")
        self.words = local(PAIR, "uint32")
        # Results of products, and what is kept between blocks of keys.
        self.score = local(KEY_BLOCK * WIDTH, "float32")
        self.product = local(2 * amx.TILE * WIDTH, "float32")
        self.sums = local(BLOCKS * self.a.value_dim * WIDTH, "float32")
        self.best, self.total = local(BLOCKS * WIDTH, "float32"), local(BLOCKS * WIDTH, "float32")
        self.fade = local(WIDTH, "float32")
        self.positions = local(BLOCKS * WIDTH, "int32")
        self.ranges = local(2 * BLOCKS, "int32")
        self.range = local(2, "int32")
        self.slopes = local(BLOCKS * WIDTH, "float32") if b.slopes is not None else None
        self.sinks = local(BLOCKS * WIDTH, "float32") if b.sinks is not None else None

    def emit(self) -> None:
        """The task."""
        amx.configure(amx.MOST)
        self._begin()
        with loop(ceil_div(self.o.key.shape[2], KEY_BLOCK)) as block:
            start = let(block * KEY_BLOCK)
            positions = self.b.key_positions(self.sequence, start, KEY_BLOCK)
            seen = key_range(positions, KEY_BLOCK)
            with T.If(any_seen(self.a, seen, self.range[0], self.range[1])), T.Then():
                self._cut_keys(start)
                self._cut_values(start)
                with loop(self.blocks) as rows:
                    first, last = self.ranges[2 * rows], self.ranges[2 * rows + 1]
                    with T.If(any_seen(self.a, seen, first, last)), T.Then():
                        self._scores(rows)
                        self._softmax(rows, start, positions, self._clear(positions, first))
                        self._accumulate(rows)
        amx.release()
        with loop(self.blocks) as rows:
            self._finish(rows)

    def _row(self, i: Any) -> tuple[Any, Any]:
        """(query, head) of a row of the task; rows beyond the last repeat it."""
        row = let(minimum(self.first + i, self.rows - 1))
        return let(row // self.a.group), let(self.head * self.a.group + row % self.a.group)

    def _begin(self) -> None:
        """Positions, empty sums, and the queries as right operands."""
        lowest, highest = tirx.const(2**31 - 1, "int32"), tirx.const(-(2**31), "int32")
        self.range.put(0, lowest, 1)
        self.range.put(1, highest, 1)
        with loop(self.blocks) as rows:
            self.ranges.put(2 * rows, lowest, 1)
            self.ranges.put(2 * rows + 1, highest, 1)
            with loop(WIDTH) as i:
                self._begin_row(rows, let(rows * WIDTH + i))
            with loop(2) as tile:
                self._cut_queries(let(rows * 2 + tile))
        with loop(self.blocks * (WIDTH // 16)) as i:
            # Above the scores of hidden keys, so that their weights are 0 before a row has seen any.
            self.best.put(i * 16, constant(LOWEST / 2, 16))
            self.total.put(i * 16, constant(0.0, 16))
        with loop(self.blocks * (self.a.value_dim * WIDTH // 16)) as i:
            self.sums.put(i * 16, constant(0.0, 16))

    def _begin_row(self, rows: Any, i: Any) -> None:
        place, head = self._row(i)
        position = let(self.b.query_position(self.sequence, place))
        self.positions.put(i, position, 1)
        for kept, at in ((self.ranges, 2 * rows), (self.range, 0)):
            kept.put(at, T.min(kept[at], position), 1)
            kept.put(at + 1, T.max(kept[at + 1], position), 1)
        if self.slopes is not None:
            self.slopes.put(i, self.b.slopes[head], 1)
        if self.sinks is not None:
            self.sinks.put(i, self.b.sinks[head], 1)

    # Operands

    def _cut_queries(self, tile: Any) -> None:
        """One register's rows of scaled queries, all steps."""
        for step in range(self.steps):
            with loop(amx.TILE) as i:
                place, head = self._row(let(tile * amx.TILE + i))
                start = let(self.o.query.at(self.sequence, head, place))
                halves = self._halves(self.b.query, start, step)
                _put_words(self.words, i * amx.TILE, [half * constant(self.a.scale, 16) for half in halves])
            self._put_transposed(self.query, let((tile * self.steps + step) * PAIR))

    def _cut_keys(self, start: Any) -> None:
        last = self.o.key.shape[2] - 1
        with loop(KEY_BLOCK) as i:
            row = let(self.o.key.at(self.sequence, self.head, minimum(start + i, last)))
            tile, line = let(i // amx.TILE), let(i % amx.TILE)
            for step in range(self.steps):
                halves = self._halves(self.b.key, row, step)
                _put_words(self.key, (tile * self.steps + step) * PAIR + line * amx.TILE, halves)

    def _cut_values(self, start: Any) -> None:
        """Value j and value j + 16 share words; then channels become rows."""
        last = self.o.value.shape[2] - 1
        with loop(self.channels) as channel, loop(KEY_BLOCK // DEPTH) as step:
            with loop(amx.TILE) as i:
                keys = [let(minimum(start + step * DEPTH + i + half, last)) for half in (0, amx.TILE)]
                rows = [let(self.o.value.at(self.sequence, self.head, key) + channel * amx.TILE) for key in keys]
                _put_words(self.words, i * amx.TILE, [floats(self.b.value.vec(row)) for row in rows])
            self._put_transposed(self.value, let((channel * (KEY_BLOCK // DEPTH) + step) * PAIR))

    def _halves(self, source: Flat, start: Any, step: int) -> list[Any]:
        """The two vectors of a step along the head dimension; zeros beyond its end."""
        places = [step * DEPTH, step * DEPTH + amx.TILE]
        return [floats(source.vec(start + place)) if place < self.a.head_dim else constant(0.0, 16) for place in places]

    def _put_transposed(self, target: Flat, at: Any) -> None:
        for part in range(2):
            lines = [let(self.words.vec(part * TILE_WORDS + i * amx.TILE)) for i in range(amx.TILE)]
            for i, line in enumerate(_transposed(lines)):
                target.put(at + part * TILE_WORDS + i * amx.TILE, line)

    # One block of keys and one of rows

    def _scores(self, rows: Any) -> None:
        """score[key, row] = key · query."""
        with loop(KEY_BLOCK // DEPTH) as pair:
            amx.clear()
            for step in range(self.steps):
                left = [((pair * 2 + i) * self.steps + step) * PAIR for i in range(2)]
                right = [((rows * 2 + i) * self.steps + step) * PAIR for i in range(2)]
                _multiply(self.key, left, self.query, right)
            for i in range(2):
                for j in range(2):
                    amx.store_at(i, j, self.score, ((pair * 2 + i) * WIDTH + j) * amx.TILE, WIDTH * 4)

    def _softmax(self, rows: Any, start: Any, positions: Flat, clear: Any) -> None:
        """Scores become weights, cut as right operands; `fade` is what sums so far are to be multiplied with.

        Args:
            rows: the block of rows.
            start: the first key.
            positions: of the keys.
            clear: whether every row sees every key, and scores are products as they are; None if they never are.
        """
        scale = self._scales("value", start)
        for tile in range(2):
            column, at = tile * 16, let(rows * WIDTH + tile * 16)
            top = local(16, "float32")
            top.put(0, self.best.vec(at))
            with _unless(clear):
                self._mask(column, at, top, start, positions)
            if clear is not None:
                with loop(KEY_BLOCK) as key:
                    top.put(0, T.max(top.vec(0), self.score.vec(key * WIDTH + column)))
            best = let(top.vec(0))
            base = let(best * constant(LOG2_E, 16))
            fade = let(_exp2((self.best.vec(at) - best) * constant(LOG2_E, 16)))
            self.fade.put(column, fade)
            self.best.put(at, best)
            sums = local(16, "float32")
            sums.put(0, self.total.vec(at) * fade)
            with loop(KEY_BLOCK // DEPTH) as step, loop(amx.TILE) as i:
                halves = []
                for half in (0, amx.TILE):
                    key = let(step * DEPTH + i + half)
                    weight = let(_exp2(fma(self.score.vec(key * WIDTH + column), constant(LOG2_E, 16), -base, 16)))
                    sums.put(0, sums.vec(0) + weight)
                    halves.append(weight if scale is None else weight * splat(scale[key]))
                _put_words(self.weight, (step * 2 + tile) * PAIR + i * amx.TILE, halves)
            self.total.put(at, sums.vec(0))

    def _mask(self, column: int, at: Any, top: Flat, start: Any, positions: Flat) -> None:
        """Products of 16 rows become scores, those that rows do not see the lowest; `top` gathers the largest."""
        scale = self._scales("key", start)
        asked = let(self.positions.vec(at))
        slope = let(self.slopes.vec(at)) if self.slopes is not None else None
        with loop(KEY_BLOCK) as key:
            place = let(key * WIDTH + column)
            position = let(splat(positions[key]))
            dot = self.score.vec(place)
            dot = dot if scale is None else dot * splat(scale[key])
            score = score_of(self.a, dot, position - asked, slope, 16)
            score = let(tirx.Select(visible(self.a, asked, position, 16), score, constant(LOWEST, 16)))
            self.score.put(place, score)
            top.put(0, T.max(top.vec(0), score))

    def _clear(self, positions: Flat, first: Any) -> Any:
        """Whether a mask would hide nothing from rows whose first position is `first`; None if it has to be applied."""
        a = self.a
        if a.window or a.chunk or a.softcap or a.alibi or self.b.key_scale is not None:
            return None
        keys = positions.vec(0, KEY_BLOCK)
        lowest, highest = (
            let(tirx.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{kind}.v{KEY_BLOCK}i32", keys))
            for kind in ("smin", "smax")
        )
        none = tirx.const(0, "int32")
        seen = tirx.And(lowest >= none, first >= none)
        return let(tirx.And(seen, highest <= first) if a.causal else seen)

    def _scales(self, kind: str, start: Any) -> Flat | None:
        """Scales of a block's keys or values; None where they are no codes."""
        b = self.b
        buffer, layout = (b.key_scale, self.o.key_scale) if kind == "key" else (b.value_scale, self.o.value_scale)
        if buffer is None or layout is None:
            return None
        found, last = local(KEY_BLOCK, "float32"), self.o.key.shape[2] - 1
        with loop(KEY_BLOCK) as i:
            found.put(i, buffer[layout.at(self.sequence, self.head, minimum(start + i, last), 0)], 1)
        return found

    def _accumulate(self, rows: Any) -> None:
        """sums[channel, row] = fade[row] sums[channel, row] + value · weights."""
        fades = [let(self.fade.vec(16 * tile)) for tile in range(2)]
        with loop(ceil_div(self.channels, 2)) as pair:
            # Of an odd number of channel tiles, the last pair takes one again.
            first = let(minimum(pair * 2, self.channels - 2)) if self.channels > 1 else 0
            chosen = [first, first + min(1, self.channels - 1)]
            amx.clear()
            for step in range(KEY_BLOCK // DEPTH):
                left = [(channel * (KEY_BLOCK // DEPTH) + step) * PAIR for channel in chosen]
                _multiply(self.value, left, self.weight, [(step * 2 + j) * PAIR for j in range(2)])
            for i in range(2):
                for j in range(2):
                    amx.store_at(i, j, self.product, (i * WIDTH + j) * amx.TILE, WIDTH * 4)
            done = let(pair * 2 - first)
            with loop((min(2, self.channels) - done) * amx.TILE) as line:
                source = let((done * amx.TILE + line) * WIDTH)
                target = let((rows * self.a.value_dim + (first + done) * amx.TILE + line) * WIDTH)
                for tile, fade in enumerate(fades):
                    faded = self.sums.vec(target + 16 * tile) * fade
                    self.sums.put(target + 16 * tile, faded + self.product.vec(source + 16 * tile))

    def _finish(self, rows: Any) -> None:
        """Divides sums by the sums of weights, and writes channels side by side."""
        with loop(2) as tile:
            column, at = let(tile * 16), let(rows * WIDTH + tile * 16)
            factor = let(self._factor(at))
            targets = []
            for i in range(16):
                place, head = self._row(let(at + i))
                line = (self.sequence * self.o.query.shape[2] + place) * self.a.heads + head
                targets.append(let(line * self.a.value_dim))
            with loop(self.channels) as channel:
                start = let((rows * self.a.value_dim + channel * amx.TILE) * WIDTH + column)
                lines = [let(self.sums.vec(start + i * WIDTH) * factor) for i in range(16)]
                for target, line in zip(targets, _transposed(lines), strict=True):
                    self.b.out.put(target + channel * amx.TILE, line)

    def _factor(self, at: Any) -> Any:
        total, one = self.total.vec(at), constant(1.0, 16)
        scale = one
        if self.sinks is not None:
            best, sink = let(self.best.vec(at)), let(self.sinks.vec(at))
            top = let(T.max(best, sink))
            scale = exp(best - top, 16)
            total = total * scale + exp(sink - top, 16)
        total = let(total)
        none = constant(0.0, 16)
        return tirx.Select(total > none, scale / total, none)


@contextmanager
def _unless(condition: Any) -> Iterator[None]:
    """What is emitted runs if the condition does not hold; always if there is none."""
    if condition is None:
        yield
        return
    with T.If(tirx.Not(condition)), T.Then():
        yield


def _multiply(left: Flat, lefts: list[Any], right: Flat, rights: list[Any]) -> None:
    """Adds the products of two by two tiles to the registers; offsets are those of the larger parts."""
    _load(left, [at + TILE_WORDS for at in lefts], right, rights)
    _load(left, lefts, None, [])
    _load(None, [], right, [at + TILE_WORDS for at in rights])


def _load(left: Flat | None, lefts: list[Any], right: Flat | None, rights: list[Any]) -> None:
    """Loads new operands on one or both sides, and multiplies."""
    for i, at in enumerate(lefts):
        amx.load_left(i, left, at)
    for i, at in enumerate(rights):
        amx.load_right(i, right, at)
    amx.multiply_halves()


def _put_words(target: Flat, at: Any, halves: list[Any]) -> None:
    """Cuts two vectors of floats and stores their words: the larger parts, and `TILE_WORDS` on what is left."""
    parts = [_cut(let(half)) for half in halves]
    for part, (first, second) in enumerate(zip(*parts, strict=True)):
        word = (second & splat(_UPPER)) | (first >> splat(tirx.const(16, "uint32")))
        target.put(at + part * TILE_WORDS, word)


_UPPER = tirx.const(0xFFFF0000, "uint32")


def _cut(value: Any) -> tuple[Any, Any]:
    """A float32 as two words whose upper halves are bfloat16: the nearest one, and the nearest of what is left."""
    half = splat(tirx.const(0x8000, "uint32"))
    high = let((tirx.reinterpret("uint32x16", value) + half) & splat(_UPPER))
    return high, let(tirx.reinterpret("uint32x16", value - tirx.reinterpret("float32x16", high)) + half)


def _exp2(x: Any) -> Any:
    """2 to the x for x <= 0, error below 3e-7."""
    power = let(rounded(x, 16))
    rest = let(x - power)
    value = constant(EXP2_COEFFICIENTS[-1], 16)
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        value = fma(value, rest, constant(coefficient, 16), 16)
    # All lanes, and the rounding that is set.
    mask, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")
    return tirx.call_llvm_pure_intrin("float32x16", SCALE, value, power, constant(0.0, 16), mask, rounding)


def _transposed(lines: list[Any]) -> list[Any]:
    """Sixteen vectors of 16 as their transpose, exchanging ever larger squares."""
    for distance in (1, 2, 4, 8):
        moved = list(lines)
        for i in (i for i in range(16) if not i & distance):
            pair = [lines[i], lines[i + distance]]
            low = [lane if not lane & distance else 16 + lane - distance for lane in range(16)]
            moved[i] = let(tirx.Shuffle(pair, low))
            moved[i + distance] = let(tirx.Shuffle(pair, [place + distance for place in low]))
        lines = moved
    return lines
