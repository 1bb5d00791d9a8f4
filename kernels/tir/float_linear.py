"""Floating-point activations times weights in tiles, which are floats or low-bit codes: y = x · weight.

Weights may keep two in four; then only those are read and multiplied in the kernel for one row.

One row (`vector`): every thread streams its share of the tiles once, decoding them in registers. Many rows (`matrix`):
a thread decodes two tiles into its cache, then multiplies them with as many rows at a time as registers hold sums for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Flat,
    Index,
    Kernel,
    T,
    ceil_div,
    floats,
    kernel,
    let,
    local,
    loop,
    minimum,
    parallel,
    product,
    splat,
)
from graphwright.kernels.tir.functions import fma, integer, kind
from graphwright.kernels.tir.halves import STORED, dense_floats, picked_float, words
from graphwright.kernels.tir.isa import Pick
from graphwright.kernels.tir.linear import ROWS_PER_TASK, Epilogue, Linear, Weight, clear
from graphwright.kernels.tir.tiles import ROWS, STEP, unsigned_zero

CHAINS = 4
"""Sums of one row that do not wait for each other."""

UNROLLED = 8
"""Weights along K in one turn of the innermost loop; a multiple of every step, and a part of a chunk of places."""

FEW = 8
"""Rows for which the weight is streamed rather than decoded into a cache."""

TOGETHER = 4
"""Of these, rows that a vector of weights is multiplied with at once."""

REST_BLOCK = 4
"""Rows at a time where fewer are left than registers hold sums for."""


@dataclass(frozen=True)
class Operands:
    """What is multiplied: rows of x, each a run of floats, and a weight in tiles.

    While a weight is read, the one that is `ahead` elements behind it in memory is asked for, if that is given.
    """

    layer: Linear
    x: Flat
    weight: Weight
    pick: Pick | None = None
    ahead: Any = None


def vector(layer: Linear, lanes: int, lead: Sequence[Index], pick: Pick | None = None) -> tirx.PrimFunc:
    """The kernel for one row of x [*lead, K], float32; `lead` are all 1, `lanes` floats make a vector register.

    Where a machine picks floats by their places, `pick` does so for weights that keep two in four.
    """
    with kernel("float_linear_vector") as k:
        x, weight, epilogue = _arguments(k, layer, lead)
        with parallel(layer.width // ROWS if layer.paired else layer.tiles) as tile:
            b = Operands(layer, x, weight, pick)
            chosen = [tile, tile + layer.tiles // 2] if layer.paired else [tile]
            epilogue.finish(0, chosen, [some_rows(b, [0], t, lanes)[0] for t in chosen], lanes)
    return k.function


def matrix(layer: Linear, lanes: int, lead: Sequence[Index]) -> tirx.PrimFunc:
    """The kernel for any number of rows."""
    rows = product(lead)
    with kernel("float_linear_matrix") as k:
        x, weight, epilogue = _arguments(k, layer, lead)
        b = Operands(layer, x, weight)
        if layer.halved:
            _by_panels(b, epilogue, rows, lanes)
        else:
            with T.If(rows <= tirx.const(FEW, "int64")):
                with T.Then():
                    _few(b, epilogue, rows, lanes)
                with T.Else():
                    _by_panels(b, epilogue, rows, lanes)
    return k.function


def _few(b: Operands, epilogue: Epilogue, rows: Any, lanes: int) -> None:
    """Every thread streams its share of the weight, as for one row, and multiplies it with some rows at once.

    Sums are taken in the order in which `vector` takes them, so that a row's result does not depend on its company.
    """
    layer, together = b.layer, TOGETHER if lanes == ROWS else 1
    with parallel(layer.width // ROWS if layer.paired else layer.tiles) as tile, loop(ceil_div(rows, together)) as part:
        chosen = [tile, let(tile + layer.tiles // 2)] if layer.paired else [tile]
        places = [let(minimum(part * together + i, rows - 1)) for i in range(together)]
        starts = [let(place * layer.inputs) for place in places]
        sums = [some_rows(b, starts, t, lanes) for t in chosen]
        for place, line in zip(places, zip(*sums, strict=True), strict=True):
            epilogue.finish(place, chosen, list(line), lanes)


def _by_panels(b: Operands, epilogue: Epilogue, rows: Any, lanes: int) -> None:
    """Decodes two tiles into the cache of a thread, then multiplies them with many rows."""
    layer = b.layer
    with parallel(layer.columns * let(ceil_div(rows, ROWS_PER_TASK))) as task:
        chosen = layer.tiles_of(let(task % layer.columns))
        panels = [panel(b, tile, lanes) for tile in chosen]
        first = let(task // layer.columns * ROWS_PER_TASK)
        count = let(minimum(rows - first, tirx.const(ROWS_PER_TASK, "int64")))

        def finish(places: list[Any]) -> None:
            sums = products(b, [place * layer.inputs for place in places], panels, lanes)
            for place, line in zip(places, sums, strict=True):
                epilogue.finish(place, chosen, line, lanes)

        each_block(first, count, rows_at_once(lanes, len(chosen)), finish)


def _arguments(k: Kernel, layer: Linear, lead: Sequence[Index]) -> tuple[Flat, Weight, Epilogue]:
    """The kernel's arguments, in the order in which it takes them."""
    found = k.read("x", (*lead, layer.inputs), "float32"), Weight(k, layer), Epilogue(k, layer, lead)
    k.begin()
    return found


def each_block(first: Any, count: Any, many: int, body: Callable[[list[Any]], None]) -> None:
    """Emits `body(places)` for `count` places from `first` on: `many` at a time, and the rest in smaller blocks."""
    with loop(count // many) as block:
        start = let(first + block * many)
        body([start + i for i in range(many)])
    with loop(ceil_div(count % many, REST_BLOCK)) as block:
        # Places beyond the last are computed as the last one again, and store the same values.
        start = let(first + count // many * many + block * REST_BLOCK)
        body([let(minimum(start + i, first + count - 1)) for i in range(REST_BLOCK)])


def rows_at_once(lanes: int, tiles: int) -> int:
    """Rows whose sums fit in registers: AVX2 has 16 of 8 lanes, AVX-512 and Neon have 32."""
    registers = 12 if lanes == 8 else 24
    return max(1, registers * lanes // (tiles * ROWS))


def _each_group(layer: Linear, body: Callable[[Any, int], None]) -> None:
    """Emits `body(group, stored weights in it)` for all groups; the end of the row may cut the last one short."""
    whole, rest = divmod(layer.stored, layer.stored_group)
    if whole:
        with loop(whole) as group:
            body(group, layer.stored_group)
    if rest:
        body(whole, rest)


def _each_turn(layer: Linear, width: int, body: Callable[[Any, int], None]) -> None:
    """Emits `body(first weight, weights)` for `width` stored weights, some at a time: those that share places."""
    many = STORED if layer.halved else UNROLLED
    whole, rest = divmod(width, many)
    if whole:
        with loop(whole) as turn:
            body(let(turn * many), many)
    if rest:
        body(width - rest, rest)


def some_rows(b: Operands, starts: list[Any], tile: Any, lanes: int) -> list[Flat]:
    """The products of the rows that begin at `starts` with one tile."""
    totals = [local(ROWS, "float32") for _ in starts]
    for total in totals:
        clear(total, ROWS, "float32", lanes)
    _each_group(b.layer, lambda group, width: _one_group(b, starts, tile, group, width, totals, lanes))
    return totals


def _one_group(
    b: Operands, starts: list[Any], tile: Any, group: Any, width: int, totals: list[Flat], lanes: int
) -> None:
    """Adds the products of `width` weights of a group to each row's total."""
    layer, at = b.layer, let(tile * b.layer.groups + group)
    sums = [local(CHAINS * ROWS, "float32") for _ in starts]
    for line in sums:
        clear(line, CHAINS * ROWS, "float32", lanes)

    def add(first: Any, count: int) -> None:
        for lane in range(0, ROWS, lanes):
            place = let(group * layer.stored_group + first)
            met = [_met(b, start, tile, place, count, lane, lanes) for start in starts]
            for i, weight in enumerate(_decoded(b, at, first, count, lane, lanes)):
                weight, chain = let(weight), i % CHAINS * ROWS + lane
                for line, row in zip(sums, met, strict=True):
                    line.put(chain, fma(weight, row[i], line.vec(chain, lanes), lanes), lanes)

    _each_turn(layer, width, add)
    for lane in range(0, ROWS, lanes):
        scale = let(b.weight.scale(at, lane, lanes)) if layer.scale_dtype else None
        for total, line in zip(totals, sums, strict=True):
            low, high = (line.vec(i * ROWS + lane, lanes) + line.vec((i + 1) * ROWS + lane, lanes) for i in (0, 2))
            value = low + high if scale is None else (low + high) * scale
            total.put(lane, total.vec(lane, lanes) + value, lanes)


def _met(b: Operands, start: Any, tile: Any, first: Any, count: int, lane: int, lanes: int) -> list[Any]:
    """The activations that `count` stored weights of each row from `first` on are multiplied with."""
    if b.weight.places is None:
        return [splat(b.x[start + first + i], lanes) for i in range(count)]
    chunk = words(b.weight.places, tile * b.layer.chunks + first // STORED, lane, lanes)
    groups = [start + 2 * first + 4 * (i // 2) for i in range(count)]
    return [picked_float(b.pick, b.x, group, chunk, i, lanes) for i, group in enumerate(groups)]


def _decoded(b: Operands, at: Any, first: Any, count: int, lane: int, lanes: int) -> list[Any]:
    """Weights first … first + count - 1 of group `at` as vectors of floats, before the scale.

    `first` is a multiple of `UNROLLED`.
    """
    layer, step = b.layer, STEP[b.layer.format]
    values: list[Any] = []
    for vector_ in range(ceil_div(count, step)):
        number = at * layer.vectors + first // step + vector_
        place = let((number * ROWS + lane) * (4 if layer.scale_dtype else 1))
        if b.ahead is not None and not lane:
            b.weight.stored.prefetch(place + b.ahead)
        if not layer.scale_dtype:
            values.append(b.weight.stored.vec(place, lanes))
            continue
        stored = let(b.weight.stored.vec(place, 4 * lanes))
        words = let(tirx.reinterpret(kind("int32", lanes), stored))
        bits = 32 // step
        for i in range(step):
            # Low nibbles hold the first four codes, high ones the next four.
            shift = 8 * i if bits == 8 else 8 * (i % 4) + 4 * (i // 4)
            code = (words >> integer(shift, lanes)) & integer((1 << bits) - 1, lanes)
            values.append(floats(code - _zero(b, at, lane, lanes), lanes))
    return values[:count]


def _zero(b: Operands, at: Any, lane: int, lanes: int) -> Any:
    if b.weight.zero is None:
        return integer(unsigned_zero(b.layer.format), lanes)
    return tirx.Cast(kind("int32", lanes), b.weight.zero.vec(at * ROWS + lane, lanes))


def panel(b: Operands, tile: Any, lanes: int) -> tuple[Flat, Any]:
    """The weights of a tile as floats [K, 16] and the place of the first; floats stay where they are stored."""
    layer = b.layer
    if not layer.scale_dtype and not layer.halved:
        return b.weight.stored, let(tile * (layer.inputs * ROWS))
    decoded = local(layer.inputs * ROWS, "float32")
    _each_group(layer, lambda group, width: _decode_group(b, tile, group, width, decoded, lanes))
    return decoded, 0


def _decode_group(b: Operands, tile: Any, group: Any, width: int, decoded: Flat, lanes: int) -> None:
    at = let(tile * b.layer.groups + group)

    def decode(first: Any, count: int) -> None:
        place = let(group * b.layer.stored_group + first)
        for lane in range(0, ROWS, lanes):
            values = _decoded(b, at, first, count, lane, lanes)
            if b.layer.scale_dtype:
                scale = let(b.weight.scale(at, lane, lanes))
                values = [value * scale for value in values]
            where = place
            if b.weight.places is not None:
                values, where = _spread(b, tile, place, values, lane, lanes), 2 * place
            for i, value in enumerate(values):
                decoded.put((where + i) * ROWS + lane, value, lanes)

    _each_turn(b.layer, width, decode)


def _spread(b: Operands, tile: Any, first: Any, values: list[Any], lane: int, lanes: int) -> list[Any]:
    """Stored weights from `first` on, at their places among zeros."""
    chunk = words(b.weight.places, tile * b.layer.chunks + first // STORED, lane, lanes)
    pairs = [(let(values[i]), let(values[i + 1]), i) for i in range(0, len(values), 2)]
    return [value for one, two, i in pairs for value in dense_floats(one, two, chunk, i, lanes)]


def products(b: Operands, starts: list[Any], panels: list[tuple[Flat, Any]], lanes: int) -> list[list[Flat]]:
    """Sums [row][tile] of rows of x, given by where they begin, times tiles."""
    sums = [[local(ROWS, "float32") for _ in panels] for _ in starts]
    for line in sums:
        for total in line:
            clear(total, ROWS, "float32", lanes)
    with loop(b.layer.inputs) as at:
        if b.ahead is not None and not b.layer.scale_dtype:
            for weight, place in panels:
                weight.prefetch(place + at * ROWS + b.ahead)
        for lane in range(0, ROWS, lanes):
            weights = [let(weight.vec(place + at * ROWS + lane, lanes)) for weight, place in panels]
            for start, line in zip(starts, sums, strict=True):
                x = let(splat(b.x[start + at], lanes))
                for weight, total in zip(weights, line, strict=True):
                    total.put(lane, fma(weight, x, total.vec(lane, lanes), lanes), lanes)
    return sums
