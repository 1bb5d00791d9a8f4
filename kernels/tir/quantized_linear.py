"""Low-bit weights times 8-bit activations: y = step * sum over groups of scale * (codes · weight - zero * sum(codes)).

One row (`vector`): every thread streams its share of the weight tiles once, unpacking in registers. Many rows
(`matrix`): a thread unpacks two tiles into its cache, then multiplies them with all rows, four at a time. Both end in
an epilogue: bias, a residual added, or activation(gate) * up of a merged gate-and-up projection.
"""

from collections.abc import Sequence
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
    splat,
    zeros,
)
from graphwright.kernels.tir.functions import ACTIVATIONS
from graphwright.kernels.tir.isa import Isa
from graphwright.kernels.tir.quantize import CodeBuffers, CodeRow
from graphwright.kernels.tir.tiles import ROWS, STEP, unsigned_zero

ROW_BLOCK = 4
"""Rows of activations multiplied at a time."""

ROWS_PER_TASK = 128
"""Rows that share one unpacking of a weight tile."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer to make a kernel for.

    Attributes:
        outputs: N, of the weight.
        inputs: K.
        group_size: a multiple of `tiles.STEP`.
        format: of the weight.
        asymmetric: it has zero points.
        scale_dtype: of the weight's scales.
        bias: one is added.
        residual: a tensor of the output's shape is added.
        activation: the weight is gate and up, merged; the output is activation(gate) * up. Empty: none.
    """

    outputs: int
    inputs: int
    group_size: int
    format: str
    asymmetric: bool
    scale_dtype: str
    bias: bool = False
    residual: bool = False
    activation: str = ""

    @property
    def groups(self) -> int:
        """Groups along K, the last one padded."""
        return ceil_div(self.inputs, self.group_size)

    @property
    def tiles(self) -> int:
        """Tiles of the weight."""
        return ceil_div(self.outputs, ROWS)

    @property
    def width(self) -> int:
        """Features of the output."""
        return self.outputs // 2 if self.activation else self.outputs

    @property
    def vectors(self) -> int:
        """64-byte vectors of one group of a tile, as stored."""
        return self.group_size // STEP[self.format]

    @property
    def quads(self) -> int:
        """Groups of four codes along K in one group."""
        return self.group_size // 4


def vector(layer: QuantizedLinear, isa: Isa, lead: Sequence[Index]) -> tirx.PrimFunc:
    """The kernel for one row; `lead` are the leading dimensions of the activations, all 1."""
    with kernel("quantized_linear_vector") as k:
        b = _Buffers(k, layer, lead)
        with parallel(layer.width // ROWS if layer.activation else layer.tiles) as tile:
            chosen = [tile, tile + layer.tiles // 2] if layer.activation else [tile]
            totals = [_one_row(b, isa, t) for t in chosen]
            _finish(b, isa, 0, tile, totals)
    return k.function


def matrix(layer: QuantizedLinear, isa: Isa, lead: Sequence[Index]) -> tirx.PrimFunc:
    """The kernel for any number of rows."""
    rows: Index = 1
    for size in lead:
        rows = rows * size
    columns = layer.width // ROWS if layer.activation else ceil_div(layer.tiles, 2)
    with kernel("quantized_linear_matrix") as k:
        b = _Buffers(k, layer, lead)
        shares = let(ceil_div(rows, ROWS_PER_TASK))
        with parallel(columns * shares) as task:
            column, share = let(task % columns), let(task // columns)
            chosen = _tiles_of(layer, column)
            unpacked = [_unpacked(b, isa, t) for t in chosen]
            first = let(share * ROWS_PER_TASK)
            with loop(ceil_div(minimum(rows - first, tirx.const(ROWS_PER_TASK, "int64")), ROW_BLOCK)) as block:
                # Rows beyond the last are computed as the last one again, and store the same values.
                at = [let(minimum(first + block * ROW_BLOCK + i, rows - 1)) for i in range(ROW_BLOCK)]
                totals = _row_block(b, isa, at, chosen, unpacked)
                for i, row in enumerate(at):
                    if layer.activation:
                        _finish(b, isa, row, column, totals[i])
                    else:
                        for t, total in zip(chosen, totals[i], strict=True):
                            _finish(b, isa, row, t, [total])
    return k.function


class _Buffers:
    """The kernel's arguments, in the order in which it takes them."""

    def __init__(self, k: Kernel, layer: QuantizedLinear, lead: Sequence[Index]) -> None:
        self.layer = layer
        self.codes = CodeBuffers(k, lead, CodeRow(layer.inputs, layer.group_size))
        tile_bytes = layer.groups * layer.vectors * 4 * ROWS
        self.weight = k.read("weight", (layer.tiles, tile_bytes), "uint8")
        groups = (layer.tiles, layer.groups, ROWS)
        self.scale = k.read("scale", groups, layer.scale_dtype)
        self.zero = k.read("zero", groups, "uint8") if layer.asymmetric else None
        self.bias = k.read("bias", (layer.outputs,), "float32") if layer.bias else None
        self.residual = k.read("residual", (*lead, layer.width), "float32") if layer.residual else None
        self.out = k.write("out", (*lead, layer.width), "float32")
        self.quads = layer.groups * layer.quads
        k.begin()
        self.codes.begin()


def _tiles_of(layer: QuantizedLinear, column: Any) -> list[Any]:
    if layer.activation:
        return [column, let(column + layer.tiles // 2)]
    if layer.tiles == 1:
        return [column]
    # An odd last tile is computed twice by its thread, into the same place.
    return [let(column * 2), let(minimum(column * 2 + 1, tirx.const(layer.tiles - 1, "int64")))]


def _one_row(b: _Buffers, isa: Isa, tile: Any) -> Flat:
    """Sums of one tile for the only row, before the activation's scale."""
    layer, lanes = b.layer, isa.lanes
    total, sums = local(ROWS, "float32"), local(2 * ROWS, "int32")
    _clear(total, ROWS, lanes)
    with loop(layer.groups) as group:
        at = let(tile * layer.groups + group)
        for lane in range(0, ROWS, lanes):
            sums.put(lane, _start(b, isa, at, lane, b.codes.sum(0, group)), lanes)
            sums.put(ROWS + lane, zeros("int32", lanes), lanes)
        with loop(layer.vectors) if layer.vectors > 16 else T.unroll(0, layer.vectors) as v:
            for lane in range(0, ROWS, lanes):
                stored = let(b.weight.vec((at * layer.vectors + v) * 4 * ROWS + 4 * lane, 4 * lanes))
                for half, weights in enumerate(_nibbles(layer, isa, stored, lanes)):
                    code = b.codes.quad(0, group * layer.quads + v * (STEP[layer.format] // 4) + half)
                    place = half * ROWS + lane
                    sums.put(place, isa.dot(sums.vec(place, lanes), weights, code, lanes), lanes)
        for lane in range(0, ROWS, lanes):
            both = sums.vec(lane, lanes) + sums.vec(ROWS + lane, lanes)
            total.put(lane, total.vec(lane, lanes) + floats(both, lanes) * _scale(b, at, lane, lanes), lanes)
    return total


def _unpacked(b: _Buffers, isa: Isa, tile: Any) -> Flat:
    """The weights of a tile, one byte each, as [K / 4, 16, 4]; the stored ones where they are bytes already."""
    layer = b.layer
    if layer.format == "int8":
        return b.weight
    vectors = layer.groups * layer.vectors
    bytes_ = local(vectors * 2 * 4 * ROWS, "uint8")
    with loop(vectors) as v:
        for lane in range(0, ROWS, isa.lanes):
            stored = let(b.weight.vec((tile * vectors + v) * 4 * ROWS + 4 * lane, 4 * isa.lanes))
            for half, weights in enumerate(_nibbles(layer, isa, stored, isa.lanes)):
                bytes_.put((v * 2 + half) * 4 * ROWS + 4 * lane, weights, 4 * isa.lanes)
    return bytes_


def _row_block(b: _Buffers, isa: Isa, rows: list[Any], tiles: list[Any], weights: list[Flat]) -> list[list[Flat]]:
    """Sums [row][tile], before the activations' scales."""
    layer, lanes = b.layer, isa.lanes
    totals = [[local(ROWS, "float32") for _ in tiles] for _ in rows]
    sums = [[local(ROWS, "int32") for _ in tiles] for _ in rows]
    for line in totals:
        for total in line:
            _clear(total, ROWS, lanes)
    with loop(layer.groups) as group:
        for i, row in enumerate(rows):
            for j, tile in enumerate(tiles):
                for lane in range(0, ROWS, lanes):
                    at = tile * layer.groups + group
                    sums[i][j].put(lane, _start(b, isa, at, lane, b.codes.sum(row, group)), lanes)
        with loop(layer.quads) if layer.quads > 16 else T.unroll(0, layer.quads) as quad:
            place = let(group * layer.quads + quad)
            for lane in range(0, ROWS, lanes):
                loaded = [let(_bytes(b, isa, w, t, place, lane)) for w, t in zip(weights, tiles, strict=True)]
                for i, row in enumerate(rows):
                    code = let(b.codes.quad(row, place))
                    for j, weight in enumerate(loaded):
                        sums[i][j].put(lane, isa.dot(sums[i][j].vec(lane, lanes), weight, code, lanes), lanes)
        for j, tile in enumerate(tiles):
            for lane in range(0, ROWS, lanes):
                scale = let(_scale(b, tile * layer.groups + group, lane, lanes))
                for i in range(len(rows)):
                    total = totals[i][j]
                    total.put(lane, total.vec(lane, lanes) + floats(sums[i][j].vec(lane, lanes), lanes) * scale, lanes)
    return totals


def _bytes(b: _Buffers, isa: Isa, weights: Flat, tile: Any, place: Any, lane: int) -> Any:
    stored_as_bytes = weights is b.weight
    start = tile * b.quads + place if stored_as_bytes else place
    loaded = weights.vec(start * 4 * ROWS + 4 * lane, 4 * isa.lanes)
    return _flipped(isa, loaded, isa.lanes) if stored_as_bytes else loaded


def _nibbles(layer: QuantizedLinear, isa: Isa, stored: Any, lanes: int) -> list[Any]:
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
    layer, lanes = b.layer, isa.lanes
    shift = 128 if isa.signed and layer.format == "int8" else 0
    if b.zero is None:
        return splat(codes_sum * tirx.const(shift - unsigned_zero(layer.format), "int32"), lanes)
    zero = tirx.Cast(f"int32x{lanes}", b.zero.vec(at * ROWS + lane, lanes))
    return splat(tirx.const(0, "int32") - codes_sum, lanes) * (zero - splat(tirx.const(shift, "int32"), lanes))


def _scale(b: _Buffers, at: Any, lane: int, lanes: int) -> Any:
    return floats(b.scale.vec(at * ROWS + lane, lanes), lanes)


def _clear(total: Flat, elements: int, lanes: int) -> None:
    for lane in range(0, elements, lanes):
        total.put(lane, zeros("float32", lanes), lanes)


def _finish(b: _Buffers, isa: Isa, row: Any, tile: Any, totals: list[Flat]) -> None:
    """Scale, bias, activation or residual of one row of one tile, stored where the output has it."""
    layer, lanes = b.layer, isa.lanes
    step = let(b.codes.step(row))
    result = totals[0]
    for lane in range(0, ROWS, lanes):
        values = [total.vec(lane, lanes) * splat(step, lanes) for total in totals]
        if b.bias is not None and layer.outputs % ROWS == 0:
            starts = [tile, tile + layer.tiles // 2]
            values = [v + b.bias.vec(t * ROWS + lane, lanes) for v, t in zip(values, starts, strict=False)]
        if layer.activation:
            gate = let(values[0])
            values = [ACTIVATIONS[layer.activation](gate, lanes) * values[1]]
        result.put(lane, values[0], lanes)
    _store(b, isa, row, tile, result)


def _store(b: _Buffers, isa: Isa, row: Any, tile: Any, result: Flat) -> None:
    layer, lanes = b.layer, isa.lanes
    start = let(row * layer.width + tile * ROWS)
    if layer.width % ROWS == 0:
        for lane in range(0, ROWS, lanes):
            value = result.vec(lane, lanes)
            if b.residual is not None:
                value = value + b.residual.vec(start + lane, lanes)
            b.out.put(start + lane, value, lanes)
        return
    with loop(minimum(layer.width - tile * ROWS, tirx.const(ROWS, "int64"))) as i:
        value = result[i]
        if b.bias is not None:
            value = value + b.bias[tile * ROWS + i]
        if b.residual is not None:
            value = value + b.residual[start + i]
        b.out.put(start + i, value, 1)
