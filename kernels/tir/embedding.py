"""Rows of a table in weight tiles, so that a tied vocabulary head and token embedding are stored once."""

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import Flat, Index, T, floats, kernel, let, loop, parallel, product, splat
from graphwright.kernels.tir.linear import Linear, Weight
from graphwright.kernels.tir.tiles import ROWS, STEP, unsigned_zero


def embedding(table: Linear, shape: Sequence[Index]) -> tirx.PrimFunc:
    """(indices int64 `shape`, table) -> float32 [*shape, K]; the table is described as a linear layer's weight."""
    with kernel("embedding") as k:
        index = k.read("indices", tuple(shape), "int64")
        weight = Weight(k, table)
        out = k.write("out", (*shape, table.inputs), "float32")
        k.begin()
        with parallel(product(shape)) as row:
            chosen = let(index[row])
            tile, lane = let(chosen // ROWS), let(chosen % ROWS)
            if table.scale_dtype:
                _decode(table, weight, tile, lane, out, row)
            else:
                with loop(table.inputs) as at:
                    out.put(row * table.inputs + at, weight.stored[(tile * table.inputs + at) * ROWS + lane], 1)
    return k.function


def _decode(table: Linear, weight: Weight, tile: Any, lane: Any, out: Flat, row: Any) -> None:
    """One row of codes, four at a time as they are stored; the last ones of a width that four does not divide alone."""
    width = table.inputs
    with loop(width // 4) as quad:
        out.put(row * width + quad * 4, _four(table, weight, tile, lane, let(quad * 4)), 4)
    if width % 4:
        last = let(_four(table, weight, tile, lane, tirx.const(width - width % 4, "int64")))
        for i in range(width % 4):
            out.put(row * width + width - width % 4 + i, tirx.Shuffle([last], [i]), 1)


def _four(table: Linear, weight: Weight, tile: Any, lane: Any, at: Any) -> Any:
    """Weights at … at + 3 of a row of a tile."""
    group = let(tile * table.groups + at // table.group_size)
    scale = let(weight.scale(group, lane, 1))
    zero = weight.zero[group * ROWS + lane] if weight.zero else tirx.const(unsigned_zero(table.format), "uint8")
    vector = tile * (table.groups * table.vectors) + at // STEP[table.format]
    packed = let(weight.stored.vec((vector * ROWS + lane) * 4, 4))
    if table.format == "int4":
        shifted = T.Select((at // 4) % 2 == 1, packed >> splat(tirx.const(4, "uint8"), 4), packed)
        packed = shifted & splat(tirx.const(15, "uint8"), 4)
    return (floats(packed, 4) - splat(floats(zero, 1), 4)) * splat(scale, 4)
