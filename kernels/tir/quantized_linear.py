"""Low-bit weights times 8-bit activations: y = sum over groups of step * scale * (codes · weight - zero * sum(codes)).

One row (`vector`), or the few of a batched decode step: every thread streams its share of the weight tiles once,
unpacking in registers. Many rows (`matrix`): a thread unpacks two tiles into its cache, then multiplies them with all
rows, four at a time in vector registers, or 32 at a time in tile registers.

Of weights that keep two in four, a stream multiplies the kept ones with the codes that it picks for them; then the sum
of codes that a zero point needs is another one for each row, and is taken in the same loop. For many rows the weights
go back to their places.
"""

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from graphwright.kernels.tir import amx
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
    zeros,
)
from graphwright.kernels.tir.halves import STORED, dense_quads, picked_codes, words
from graphwright.kernels.tir.isa import Dot, Isa, Words
from graphwright.kernels.tir.linear import Epilogue, Linear, Schedule, Weight, clear
from graphwright.kernels.tir.quantize import CodeBuffers, CodeRow
from graphwright.kernels.tir.tiles import CHUNK, ROWS, STEP, unsigned_zero

TILE_BLOCK = amx.BLOCK * ROWS
"""Rows of activations multiplied at a time in tile registers."""

FEW = (4, 8)
"""Numbers of rows that a stream of the weight is multiplied with at once; each has code of its own."""

DEFAULT = Schedule()


def vector(layer: Linear, isa: Isa, lead: Sequence[Index]) -> tirx.PrimFunc:
    """The kernel for one row; `lead` are the leading dimensions of the activations, all 1."""
    with kernel("quantized_linear_vector") as k:
        b = _Buffers(k, layer, lead)
        with parallel(b.streams) as tile:
            _stream(b, isa, tile, [0])
    return k.function


def matrix(layer: Linear, isa: Isa, lead: Sequence[Index], schedule: Schedule = DEFAULT) -> tirx.PrimFunc:
    """The kernel for any number of rows."""
    rows = product(lead)
    with kernel("quantized_linear_matrix") as k:
        b = _Buffers(k, layer, lead)
        _by_rows(b, isa, rows, schedule, FEW if isa.lanes == ROWS else FEW[:-1])
    return k.function


def _by_rows(b: "_Buffers", isa: Isa, rows: Any, schedule: Schedule, counts: Sequence[int]) -> None:
    """Streams the weight for the least of `counts` rows that is enough; goes about more rows in blocks."""
    if not counts:
        _by_blocks(b, isa, rows, schedule)
        return
    with T.If(rows <= counts[0]):
        with T.Then(), parallel(b.streams) as tile:
            _stream(b, isa, tile, _clamped(0, counts[0], rows))
        with T.Else():
            _by_rows(b, isa, rows, schedule, counts[1:])


def _by_blocks(b: "_Buffers", isa: Isa, rows: Any, schedule: Schedule) -> None:
    if not (isa.tiles and schedule.tile_registers and amx.depth(b.span)):
        _multiply(b, isa, rows, schedule)
        return
    with T.If(rows >= TILE_BLOCK):
        with T.Then():
            _multiply_tiles(b, isa, rows, schedule)
        with T.Else():
            _multiply(b, isa, rows, schedule)


def code_row(layer: Linear) -> CodeRow:
    """The rows of codes that a layer reads."""
    return CodeRow(layer.inputs, layer.code_group or layer.group_size, grouped=bool(layer.code_group))


def _clamped(first: Any, count: int, rows: Any) -> list[Any]:
    """Row numbers; rows beyond the last are computed as the last one again, and store the same values."""
    return [let(minimum(first + i, rows - 1)) for i in range(count)]


def _stream(b: "_Buffers", isa: Isa, tile: Any, rows: list[Any]) -> None:
    """Some rows times one tile, or a gate and its up."""
    chosen = [tile, let(tile + b.layer.tiles // 2)] if b.layer.paired else [tile]
    picks = b.weight.places is not None and isa.pick_bytes is not None
    stream = _streamed_halves if picks else _streamed
    totals = [stream(b, isa, t, rows) for t in chosen]
    for row, line in zip(rows, zip(*totals, strict=True), strict=True):
        b.finish(row, chosen, list(line), isa.lanes)


def _multiply(b: "_Buffers", isa: Isa, rows: Any, schedule: Schedule) -> None:
    """Any number of rows times the whole weight."""
    columns, share = b.layer.columns, schedule.rows_per_task
    with parallel(columns * let(ceil_div(rows, share))) as task:
        chosen = b.layer.tiles_of(let(task % columns))
        unpacked = [_unpacked(b, isa, t) for t in chosen]
        first = let(task // columns * share)
        with loop(ceil_div(minimum(rows - first, tirx.const(share, "int64")), schedule.row_block)) as block:
            at = _clamped(first + block * schedule.row_block, schedule.row_block, rows)
            totals = _row_block(b, isa, at, chosen, unpacked)
            for row, line in zip(at, totals, strict=True):
                b.finish(row, chosen, line, isa.lanes)


def _multiply_tiles(b: "_Buffers", isa: Isa, rows: Any, schedule: Schedule) -> None:
    """At least `TILE_BLOCK` rows times the whole weight, in tile registers; a last block overlaps the one before."""
    columns, share = b.layer.columns, schedule.rows_per_task
    with parallel(columns * let(ceil_div(rows, share))) as task:
        chosen = b.layer.tiles_of(let(task % columns))
        unpacked = [_signed(b, isa, t) for t in chosen]
        first = let(task // columns * share)
        amx.configure(amx.depth(b.span))
        with loop(ceil_div(minimum(rows - first, tirx.const(share, "int64")), TILE_BLOCK)) as block:
            at = let(minimum(first + block * TILE_BLOCK, rows - TILE_BLOCK))
            totals = _tile_block(b, isa, at, chosen, unpacked)
            line = [local(ROWS, "float32") for _ in chosen]
            for row in range(TILE_BLOCK):
                for part, total in zip(line, totals[row // ROWS], strict=True):
                    part.put(0, total.vec(row % ROWS * ROWS))
                b.finish(let(at + row), chosen, line, ROWS)
        amx.release()


class _Buffers:
    """The kernel's arguments, in the order in which it takes them."""

    def __init__(self, k: Kernel, layer: Linear, lead: Sequence[Index]) -> None:
        self.layer = layer
        self.codes = CodeBuffers(k, lead, code_row(layer))
        self.weight = Weight(k, layer)
        self.epilogue = Epilogue(k, layer, lead)
        self.grouped = self.codes.row.grouped
        # Weights and codes are walked in the smaller of their groups.
        self.span = self.codes.row.group_size
        self.spans = ceil_div(layer.inputs, self.span) if self.grouped else layer.groups
        self.quads = self.span // 4
        self.vectors = self.span // STEP[layer.format]
        # What one turn of a loop over a span reads: a vector of weights, or all weights of a chunk of places.
        self.turns = self.span // CHUNK if layer.halved else self.vectors
        self.tile_vectors = layer.groups * layer.vectors
        self.streams = layer.width // ROWS if layer.paired else layer.tiles
        k.begin()
        self.codes.begin()

    def group(self, tile: Any, span: Any) -> Any:
        """The number of the weight's group that holds a span."""
        layer = self.layer
        return tile * layer.groups + (span * self.span // layer.group_size if self.grouped else span)

    def words(self, isa: Isa) -> Words | None:
        """The instruction set's products in words, where it has them and weights are small enough."""
        return isa.words if self.layer.format != "int8" else None

    def dot(self, isa: Isa) -> Dot:
        """The instruction set's dot product for weights of this format."""
        words = self.words(isa)
        return words.dot if words else isa.dot

    def finish(self, row: Any, tiles: list[Any], totals: list[Flat], lanes: int) -> None:
        """Ends a row; a step of the whole row is applied here."""
        self.epilogue.finish(row, tiles, totals, lanes, None if self.grouped else let(self.codes.step(row)))

    def scaled(self, sums: Any, scale: Any, row: Any, span: Any, lanes: int) -> Any:
        """Integer sums of a span as floats, with the weight's scale, and the step where spans have their own."""
        factor = scale * splat(self.codes.step(row, span), lanes) if self.grouped else scale
        return floats(sums, lanes) * factor


def _streamed(b: _Buffers, isa: Isa, tile: Any, rows: list[Any]) -> list[Flat]:
    """Sums of one tile for each of some rows, before the activations' scales."""
    lanes = isa.lanes
    words = b.words(isa)
    # A single row has two sums, or every product would wait for the one before it.
    chains = 2 if len(rows) == 1 and not words else 1
    totals = [local(ROWS, "float32") for _ in rows]
    sums = [local(chains * ROWS, "int32") for _ in rows]
    for total in totals:
        clear(total, ROWS, "float32", lanes)
    with loop(b.spans) as span:
        at = let(b.group(tile, span))
        for lane in range(0, ROWS, lanes):
            for row, line in zip(rows, sums, strict=True):
                line.put(lane, _start(b, isa, at, lane, b.codes.sum(row, span)), lanes)
                if chains == 2:
                    line.put(ROWS + lane, zeros("int32", lanes), lanes)
        with loop(b.turns) if b.turns > 16 else T.unroll(0, b.turns) as v:
            for lane in range(0, ROWS, lanes):
                found = [let(weights) for weights in _quads(b, isa, tile, span, v, lane)]
                first = span * b.quads + v * len(found)
                for row, line in zip(rows, sums, strict=True):
                    codes = [splat(b.codes.quad(row, first + half), lanes) for half in range(len(found))]
                    if words:
                        line.put(
                            lane, words.add(line.vec(lane, lanes), _added(words, found, codes, lanes), lanes), lanes
                        )
                        continue
                    for half, (weights, code) in enumerate(zip(found, codes, strict=True)):
                        place = half % chains * ROWS + lane
                        line.put(place, isa.dot(line.vec(place, lanes), weights, code, lanes), lanes)
        for lane in range(0, ROWS, lanes):
            scale = let(b.weight.scale(at, lane, lanes))
            for row, total, line in zip(rows, totals, sums, strict=True):
                parts = [line.vec(chain * ROWS + lane, lanes) for chain in range(chains)]
                value = b.scaled(sum(parts[1:], parts[0]), scale, row, span, lanes)
                total.put(lane, total.vec(lane, lanes) + value, lanes)
    return totals


def _added(words: Words, weights: list[Any], codes: list[Any], lanes: int) -> Any:
    """Products of at most `Words.MOST` quads, int16x2L."""
    products = [words.multiply(weight, code, lanes) for weight, code in zip(weights, codes, strict=True)]
    return sum(products[1:], products[0])


def _quads(b: _Buffers, isa: Isa, tile: Any, span: Any, turn: Any, lane: int) -> list[Any]:
    """Bytes of consecutive quads of columns, from what one turn of a loop over a span reads."""
    layer, lanes = b.layer, isa.lanes
    if b.weight.places is not None:
        return _expanded(b, isa, tile, span, turn, lane)
    vector_ = tile * b.tile_vectors + span * b.vectors + turn
    stored = let(b.weight.stored.vec((vector_ * ROWS + lane) * 4, 4 * lanes))
    return _nibbles(layer, isa, stored, lanes)


def _expanded(b: _Buffers, isa: Isa, tile: Any, span: Any, chunk: Any, lane: int) -> list[Any]:
    """The eight quads of a chunk of a weight that keeps two in four."""
    layer, lanes = b.layer, isa.lanes
    number = span * b.turns + chunk
    places = words(b.weight.places, tile * layer.chunks + number, lane, lanes)
    zero = let(_zero_bytes(b, isa, b.group(tile, span), lane))
    found = []
    for quad, weights in enumerate(_stored_quads(b, isa, tile, number, lane)):
        found += dense_quads(let(tirx.reinterpret(f"int32x{lanes}", weights)), zero, places, 4 * quad, lanes)
    return found


def _stored_quads(b: _Buffers, isa: Isa, tile: Any, chunk: Any, lane: int) -> list[Any]:
    """The stored weights of a chunk, four bytes a row."""
    layer, lanes = b.layer, isa.lanes
    count = STORED // STEP[layer.format]
    found: list[Any] = []
    for v in range(count):
        vector_ = tile * b.tile_vectors + chunk * count + v
        stored = let(b.weight.stored.vec((vector_ * ROWS + lane) * 4, 4 * lanes))
        found += _nibbles(layer, isa, stored, lanes)
    return found


def _zero_bytes(b: _Buffers, isa: Isa, at: Any, lane: int) -> Any:
    """The byte that stands for zero in group `at` of each row, four times, int32xL."""
    layer, lanes = b.layer, isa.lanes
    flip = 128 if isa.signed and layer.format == "int8" else 0
    if b.weight.zero is None:
        four = bytes([unsigned_zero(layer.format) ^ flip] * 4)
        return splat(tirx.const(int.from_bytes(four, "little", signed=True), "int32"), lanes)
    zero = tirx.Cast(f"int32x{lanes}", b.weight.zero.vec(at * ROWS + lane, lanes))
    return (zero ^ splat(tirx.const(flip, "int32"), lanes)) * splat(tirx.const(0x01010101, "int32"), lanes)


def _streamed_halves(b: _Buffers, isa: Isa, tile: Any, rows: list[Any]) -> list[Flat]:
    """`_streamed` for a weight that keeps two in four: a sum of products and a sum of the codes that were picked."""
    lanes = isa.lanes
    totals = [local(ROWS, "float32") for _ in rows]
    sums = [local(2 * ROWS, "int32") for _ in rows]
    for total in totals:
        clear(total, ROWS, "float32", lanes)
    ones = splat(tirx.const(1, "uint8"), 4 * lanes)
    with loop(b.spans) as span:
        at = let(b.group(tile, span))
        for line in sums:
            clear(line, 2 * ROWS, "int32", lanes)
        with loop(b.turns) if b.turns > 4 else T.unroll(0, b.turns) as turn:
            chunk = let(span * b.turns + turn)
            for lane in range(0, ROWS, lanes):
                places = words(b.weight.places, tile * b.layer.chunks + chunk, lane, lanes)
                for quad, weights in enumerate(_stored_quads(b, isa, tile, chunk, lane)):
                    weights = let(weights)
                    for row, line in zip(rows, sums, strict=True):
                        eight = b.codes.eight(row, chunk * 4 + quad)
                        codes = let(picked_codes(isa.pick_bytes, eight, places, quad, lanes))
                        line.put(lane, b.dot(isa)(line.vec(lane, lanes), weights, codes, lanes), lanes)
                        line.put(ROWS + lane, b.dot(isa)(line.vec(ROWS + lane, lanes), ones, codes, lanes), lanes)
        for lane in range(0, ROWS, lanes):
            scale, zero = let(b.weight.scale(at, lane, lanes)), let(_signed_zero(b, isa, at, lane))
            for row, total, line in zip(rows, totals, sums, strict=True):
                products = line.vec(lane, lanes) - zero * line.vec(ROWS + lane, lanes)
                total.put(lane, total.vec(lane, lanes) + b.scaled(products, scale, row, span, lanes), lanes)
    return totals


def _unpacked(b: _Buffers, isa: Isa, tile: Any) -> Flat:
    """The weights of a tile, one byte each, as [K / 4, 16, 4]; the stored ones where they are bytes already."""
    layer = b.layer
    if layer.format == "int8" and not layer.halved:
        return b.weight.stored
    bytes_ = local(layer.groups * layer.group_size * ROWS, "uint8")
    with loop(b.spans) as span, loop(b.turns) as turn:
        for lane in range(0, ROWS, isa.lanes):
            found = _quads(b, isa, tile, span, turn, lane)
            first = let((span * b.turns + turn) * len(found))
            for i, weights in enumerate(found):
                bytes_.put((first + i) * 4 * ROWS + 4 * lane, weights, 4 * isa.lanes)
    return bytes_


def _row_block(b: _Buffers, isa: Isa, rows: list[Any], tiles: list[Any], weights: list[Flat]) -> list[list[Flat]]:
    """Sums [row][tile], before the activations' scales."""
    lanes = isa.lanes
    totals = [[local(ROWS, "float32") for _ in tiles] for _ in rows]
    sums = [[local(ROWS, "int32") for _ in tiles] for _ in rows]
    depth = next(n for n in (Words.MOST, 4, 2, 1) if b.quads % n == 0) if b.words(isa) else 1
    turns = b.quads // depth
    for line in totals:
        for total in line:
            clear(total, ROWS, "float32", lanes)
    with loop(b.spans) as span:
        for i, row in enumerate(rows):
            for j, tile in enumerate(tiles):
                for lane in range(0, ROWS, lanes):
                    start = _start(b, isa, b.group(tile, span), lane, b.codes.sum(row, span))
                    sums[i][j].put(lane, start, lanes)
        with loop(turns) if b.quads > 16 else T.unroll(0, turns) as turn:
            places = [let(span * b.quads + turn * depth + quad) for quad in range(depth)]
            for lane in range(0, ROWS, lanes):
                _products(b, isa, rows, tiles, weights, places, lane, sums)
        for j, tile in enumerate(tiles):
            for lane in range(0, ROWS, lanes):
                scale = let(b.weight.scale(b.group(tile, span), lane, lanes))
                for i, row in enumerate(rows):
                    total = totals[i][j]
                    value = b.scaled(sums[i][j].vec(lane, lanes), scale, row, span, lanes)
                    total.put(lane, total.vec(lane, lanes) + value, lanes)
    return totals


def _products(
    b: _Buffers,
    isa: Isa,
    rows: list[Any],
    tiles: list[Any],
    weights: list[Flat],
    places: list[Any],
    lane: int,
    sums: list[list[Flat]],
) -> None:
    """Adds the products of some quads to the sums [row][tile], in `lanes` lanes from `lane` on."""
    lanes, words = isa.lanes, b.words(isa)
    held = [[local(2 * lanes, "int16") for _ in tiles] for _ in rows] if words else []
    for at, place in enumerate(places):
        loaded = [let(_bytes(b, isa, w, t, place, lane)) for w, t in zip(weights, tiles, strict=True)]
        for i, row in enumerate(rows):
            code = splat(let(b.codes.quad(row, place)), lanes)
            for j, weight in enumerate(loaded):
                if words:
                    product_ = words.multiply(weight, code, lanes)
                    held[i][j].put(0, held[i][j].vec(0, 2 * lanes) + product_ if at else product_, 2 * lanes)
                else:
                    sums[i][j].put(lane, isa.dot(sums[i][j].vec(lane, lanes), weight, code, lanes), lanes)
    if words:
        for line, sums_line in zip(held, sums, strict=True):
            for word, sum_ in zip(line, sums_line, strict=True):
                sum_.put(lane, words.add(sum_.vec(lane, lanes), word.vec(0, 2 * lanes), lanes), lanes)


def _signed(b: _Buffers, isa: Isa, tile: Any) -> Flat:
    """The weights of a tile minus their zero points as int8 [K / 4, 16, 4]; bytes as they are stored."""
    layer, lanes = b.layer, 4 * ROWS
    if layer.format == "int8":
        return _unpacked(b, isa, tile)
    if layer.halved:
        return _signed_halves(b, isa, tile)
    bytes_ = local(b.tile_vectors * 2 * lanes, "int8")
    with loop(layer.groups) as group:
        if b.weight.zero is None:
            zero = splat(tirx.const(unsigned_zero(layer.format), "uint8"), lanes)
        else:
            point = tirx.Cast(f"int32x{ROWS}", b.weight.zero.vec((tile * layer.groups + group) * ROWS))
            zero = let(tirx.reinterpret(f"uint8x{lanes}", point * splat(tirx.const(0x01010101, "int32"))))
        with loop(layer.vectors) as v:
            place = let(group * layer.vectors + v)
            stored = let(b.weight.stored.vec((tile * b.tile_vectors + place) * lanes, lanes))
            for half, weights in enumerate(_nibbles(layer, isa, stored, ROWS)):
                bytes_.put((place * 2 + half) * lanes, tirx.reinterpret(f"int8x{lanes}", weights - zero), lanes)
    return bytes_


def _signed_halves(b: _Buffers, isa: Isa, tile: Any) -> Flat:
    """`_signed` for a weight that keeps two in four."""
    layer, lanes = b.layer, 4 * ROWS
    bytes_ = local(layer.groups * layer.group_size * ROWS, "int8")
    with loop(b.spans) as span:
        zero = let(tirx.reinterpret(f"uint8x{lanes}", _zero_bytes(b, isa, b.group(tile, span), 0)))
        with loop(b.turns) as turn:
            found = _quads(b, isa, tile, span, turn, 0)
            first = let((span * b.turns + turn) * len(found))
            for i, weights in enumerate(found):
                bytes_.put((first + i) * lanes, tirx.reinterpret(f"int8x{lanes}", weights - zero), lanes)
    return bytes_


def _tile_block(b: _Buffers, isa: Isa, row: Any, tiles: list[Any], weights: list[Flat]) -> list[list[Flat]]:
    """Sums [16 rows][tile] of a block from `row` on, before the activations' scales."""
    totals = [[local(ROWS * ROWS, "float32") for _ in tiles] for _ in range(amx.BLOCK)]
    products = [[local(ROWS * ROWS, "int32") for _ in tiles] for _ in range(amx.BLOCK)]
    for total in (total for line in totals for total in line):
        clear(total, ROWS * ROWS, "float32", ROWS)
    with loop(b.spans) as span:
        _tile_products(b, row, span, tiles, weights, products)
        for column, tile in enumerate(tiles):
            at = let(b.group(tile, span))
            scale = let(b.weight.scale(at, 0, ROWS))
            for line in range(amx.BLOCK * ROWS):
                total, place, token = totals[line // ROWS][column], line % ROWS * ROWS, row + line
                value = products[line // ROWS][column].vec(place)
                if b.layer.format == "int8":
                    value = value + _start(b, isa, at, 0, b.codes.sum(token, span))
                total.put(place, total.vec(place) + b.scaled(value, scale, token, span, ROWS))
    return totals


def _tile_products(
    b: _Buffers, row: Any, span: Any, tiles: list[Any], weights: list[Flat], products: list[list[Flat]]
) -> None:
    """Integer products of a block's codes and weights over one span."""
    codes, depth = b.codes.row.bytes, amx.depth(b.span)
    signed = b.layer.format != "int8"
    amx.clear()
    with loop(b.span // depth) as step:
        first = let(span * b.span + step * depth)
        for part in range(amx.BLOCK):
            amx.load_codes(part, b.codes.codes, (row + part * ROWS) * codes + first, codes)
        for part in range(amx.BLOCK):
            tile = part % len(tiles)
            in_place = weights[tile] is b.weight.stored
            start = tiles[tile] * (b.layer.groups * b.layer.group_size) if in_place else 0
            amx.load_weights(part, weights[tile], (start + first) * ROWS)
        amx.multiply(signed_weights=signed)
    for part, line in enumerate(products):
        for column, result in enumerate(line):
            amx.store(part, column, result)


def _bytes(b: _Buffers, isa: Isa, weights: Flat, tile: Any, place: Any, lane: int) -> Any:
    stored_as_bytes = weights is b.weight.stored
    start = tile * (b.layer.groups * b.layer.group_size // 4) + place if stored_as_bytes else place
    loaded = weights.vec(start * 4 * ROWS + 4 * lane, 4 * isa.lanes)
    return _flipped(isa, loaded, isa.lanes) if stored_as_bytes else loaded


def _nibbles(layer: Linear, isa: Isa, stored: Any, lanes: int) -> list[Any]:
    """Bytes for the dot product from a stored vector: itself, or its low and its high nibbles."""
    if layer.format == "int8":
        return [_flipped(isa, stored, lanes)]
    mask = splat(tirx.const(15, "uint8"), 4 * lanes)
    words = tirx.reinterpret(f"uint16x{2 * lanes}", stored) >> splat(tirx.const(4, "uint16"), 2 * lanes)
    return [stored & mask, tirx.reinterpret(f"uint8x{4 * lanes}", words) & mask]


def _flipped(isa: Isa, weights: Any, lanes: int) -> Any:
    return weights ^ splat(tirx.const(128, "uint8"), 4 * lanes) if isa.signed else weights


def _start(b: _Buffers, isa: Isa, at: Any, lane: int, codes_sum: Any) -> Any:
    """-zero * sum(codes): what the sums of a group start from."""
    return splat(tirx.const(0, "int32") - codes_sum, isa.lanes) * _signed_zero(b, isa, at, lane)


def _signed_zero(b: _Buffers, isa: Isa, at: Any, lane: int) -> Any:
    """What the multiplied bytes of group `at` are more than the weights in steps, int32xL."""
    layer, lanes = b.layer, isa.lanes
    shift = 128 if isa.signed and layer.format == "int8" else 0
    if b.weight.zero is None:
        return splat(tirx.const(unsigned_zero(layer.format) - shift, "int32"), lanes)
    zero = tirx.Cast(f"int32x{lanes}", b.weight.zero.vec(at * ROWS + lane, lanes))
    return zero - splat(tirx.const(shift, "int32"), lanes)
