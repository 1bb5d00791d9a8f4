"""What weights that keep two in four add to the kernels of linear layers; their tiles are described in `tiles`.

A product takes half the weights, and for each the activation at its place in its group of four: where the machine can
pick bytes or floats by their places, the activations are picked; else the weights go back to their places first.
"""

from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import Flat, let, splat
from graphwright.kernels.tir.functions import integer, kind
from graphwright.kernels.tir.isa import Pick
from graphwright.kernels.tir.tiles import CHUNK, ROWS

STORED = CHUNK // 2
"""Stored weights of a row in one chunk."""


def words(places: Flat, chunk: Any, lane: int, lanes: int) -> Any:
    """The places of a chunk, numbered over all tiles, for `lanes` rows."""
    return let(places.vec(chunk * ROWS + lane, lanes))


def place(chunk_words: Any, number: int, lanes: int, *, exact: bool = True) -> Any:
    """The place of stored weight `number` of a chunk in its group of four, int32xL; only the lowest two bits count."""
    shifted = chunk_words >> integer(2 * (number // 4) + 8 * (number % 4), lanes)
    return shifted & integer(3, lanes) if exact else shifted


def picked_float(pick: Pick | None, x: Flat, start: Any, chunk_words: Any, number: int, lanes: int) -> Any:
    """Of the four floats of x from `start` on, the one that each row's stored weight `number` is multiplied with."""
    if pick is not None:
        four = let(x.vec(start, 4))
        fours = tirx.Shuffle([four] * (lanes // 4), list(range(lanes)))
        return pick(fours, place(chunk_words, number, lanes, exact=False))
    where = let(place(chunk_words, number, lanes))
    value = splat(x[start + 3], lanes)
    for other in range(2, -1, -1):
        value = tirx.Select(tirx.EQ(where, integer(other, lanes)), splat(x[start + other], lanes), value)
    return value


def dense_floats(first: Any, second: Any, chunk_words: Any, number: int, lanes: int) -> list[Any]:
    """The four floats of each row's group whose stored weights are `number` and the next one."""
    one, two = (let(place(chunk_words, number + i, lanes)) for i in range(2))
    nothing = splat(tirx.const(0.0, "float32"), lanes)
    return [
        tirx.Select(
            tirx.EQ(one, integer(at, lanes)), first, tirx.Select(tirx.EQ(two, integer(at, lanes)), second, nothing)
        )
        for at in range(4)
    ]


def picked_codes(pick: Pick, eight: Any, chunk_words: Any, quad: int, lanes: int) -> Any:
    """Of eight codes, as int64, those that the stored weights of quad 0 to 3 of a chunk meet: int32xL, four a row."""
    values = tirx.reinterpret(f"uint8x{4 * lanes}", splat(eight, lanes // 2))
    shifted = (chunk_words >> integer(2 * quad, lanes)) & integer(0x03030303, lanes)
    places = tirx.reinterpret(f"uint8x{4 * lanes}", shifted | integer(0x04040000, lanes))
    return tirx.reinterpret(kind("int32", lanes), pick(values, places))


def dense_quads(quad: Any, zero: Any, chunk_words: Any, number: int, lanes: int) -> list[Any]:
    """Bytes of two groups of four, uint8x4L each, from the four stored ones of each row.

    Args:
        quad: int32xL, the four stored bytes of each row, the two of a group next to each other.
        zero: int32xL, the byte that stands for zero, four times.
        chunk_words: of `words`.
        number: of the first of the four in its chunk.
        lanes: L.
    """
    found = []
    for group in range(2):
        value = zero
        for i in range(2):
            byte = 2 * group + i
            stored = ((quad ^ zero) >> integer(8 * byte, lanes)) & integer(255, lanes)
            value = value ^ (stored << (place(chunk_words, number + byte, lanes) << integer(3, lanes)))
        found.append(tirx.reinterpret(f"uint8x{4 * lanes}", let(value)))
    return found
