"""Rows of a table in weight tiles, so that a tied vocabulary head and token embedding are stored once."""

from tvm import tirx

from graphwright.kernels.tir.emit import Layout, T, floats, kernel, let, loop, parallel, product, splat
from graphwright.kernels.tir.quantized_linear import QuantizedLinear
from graphwright.kernels.tir.tiles import ROWS, STEP, unsigned_zero


def quantized_embedding(table: QuantizedLinear, indices: Layout, width: int) -> tirx.PrimFunc:
    """(index layout, table) -> float32 [..., width]; `table` is described as if it were a linear layer's weight."""
    with kernel("quantized_embedding") as k:
        index = k.read("indices", indices.base, "int64")
        stored = k.read("weight", (table.tiles, table.groups * table.vectors * 4 * ROWS), "uint8")
        groups = (table.tiles, table.groups, ROWS)
        scales = k.read("scale", groups, table.scale_dtype)
        zeros = k.read("zero", groups, "uint8") if table.asymmetric else None
        out = k.write("out", (*indices.shape, width), "float32")
        k.begin()
        per_vector = STEP[table.format]
        with parallel(product(indices.shape)) as row:
            batch, place = row // indices.shape[1], row % indices.shape[1]
            chosen = let(index[indices.at(batch, place)])
            tile, lane = let(chosen // ROWS), let(chosen % ROWS)
            with loop(width // 4) as quad:
                at = let(quad * 4)
                group = let(tile * table.groups + at // table.group_size)
                scale = let(floats(scales[group * ROWS + lane], 1))
                zero = zeros[group * ROWS + lane] if zeros else tirx.const(unsigned_zero(table.format), "uint8")
                vector = tile * (table.groups * table.vectors) + at // per_vector
                packed = let(stored.vec((vector * ROWS + lane) * 4, 4))
                if table.format == "int4":
                    high = (at // 4) % 2 == 1
                    packed = T.Select(high, packed >> splat(tirx.const(4, "uint8"), 4), packed) & splat(
                        tirx.const(15, "uint8"), 4
                    )
                values = floats(packed, 4) - splat(floats(zero, 1), 4)
                out.put(row * width + at, values * splat(scale, 4), 4)
    return k.function
