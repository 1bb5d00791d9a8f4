"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): a table per forward, then rotations that read it.

The rotation of keys may write into a cache; so does the plain update, which is a rotation by nothing.
"""

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import Flat, Layout, T, kernel, let, local, loop, parallel, product, widest
from graphwright.kernels.tir.quantize import round_codes


def table(positions: Layout, half: int, scaling: float) -> tirx.PrimFunc:
    """Cosine and sine [..., half] of position * inv_freq, times `scaling`."""
    with kernel("rope_table") as k:
        at = k.read("positions", positions.base, "int64")
        inv_freq = k.read("inv_freq", (half,), "float32")
        cos = k.write("cos", (*positions.shape, half), "float32")
        sin = k.write("sin", (*positions.shape, half), "float32")
        k.begin()
        factor = tirx.const(scaling, "float32")
        with parallel(product(positions.shape)) as row:
            batch, place = row // positions.shape[1], row % positions.shape[1]
            position = let(tirx.Cast("float32", at[positions.at(batch, place)]))
            with loop(half) as i:
                angle = let(position * inv_freq[i])
                cos.put(row * half + i, tirx.cos(angle) * factor, 1)
                sin.put(row * half + i, tirx.sin(angle) * factor, 1)
    return k.function


@dataclass(frozen=True)
class Rotation:
    """What is rotated: the first 2 * half channels of [B, H, S, D].

    Attributes:
        half: rotated pairs; 0 for none.
        interleaved: pairs are neighbours, else half apart.
    """

    half: int = 0
    interleaved: bool = False


def rotate(rotation: Rotation, x: Layout, positions: Layout) -> tirx.PrimFunc:
    """X rotated, as a contiguous [B, S, H, D]."""
    batch, heads, length, head_dim = x.shape
    with kernel("rope") as k:
        source = k.read("x", x.base, "float32")
        cos, sin = _table(k, rotation, positions)
        out = k.write("out", (batch, length, heads, head_dim), "float32")
        k.begin()
        with parallel(batch * length) as row:
            b, s = let(row // length), let(row % length)
            with loop(heads) as h:
                target = let((row * heads + h) * head_dim)
                _turn(
                    rotation, source, let(x.at(b, h, s)), out, target, cos, sin, _table_row(positions, b, s), head_dim
                )
    return k.function


def update_cache(
    rotation: Rotation, x: Layout, cache: Layout, slots: Layout, positions: Layout | None, dtype: str
) -> tirx.PrimFunc:
    """cache[b, h, slots[b, s]] = x[b, h, s], rotated, for slots that are not negative; the cache comes last."""
    batch, heads, length, head_dim = x.shape
    with kernel("kv_cache_update") as k:
        source = k.read("x", x.base, "float32")
        at = k.read("slots", slots.base, "int64")
        cos, sin = _table(k, rotation, positions) if positions else (None, None)
        out = k.write("cache", cache.base, dtype)
        k.begin()
        with parallel(batch * length) as row:
            b, s = let(row // length), let(row % length)
            slot = let(at[slots.at(b, s)])
            with T.If(slot >= tirx.const(0, "int64")), T.Then(), loop(heads) as h:
                place = _table_row(positions, b, s) if positions else 0
                _turn(rotation, source, let(x.at(b, h, s)), out, let(cache.at(b, h, slot)), cos, sin, place, head_dim)
    return k.function


def update_codes(
    rotation: Rotation, x: Layout, codes: Layout, scale: Layout, slots: Layout, positions: Layout | None
) -> tirx.PrimFunc:
    """Like `update_cache`, rounded to int8 with one scale per token and head; codes and scales come last."""
    batch, heads, length, head_dim = x.shape
    with kernel("kv_cache_update_int8") as k:
        source = k.read("x", x.base, "float32")
        at = k.read("slots", slots.base, "int64")
        cos, sin = _table(k, rotation, positions) if positions else (None, None)
        codes_out, scale_out = k.write("codes", codes.base, "int8"), k.write("scale", scale.base, "float32")
        k.begin()
        with parallel(batch * length) as row:
            b, s = let(row // length), let(row % length)
            slot = let(at[slots.at(b, s)])
            turned = local(head_dim, "float32")
            with T.If(slot >= tirx.const(0, "int64")), T.Then(), loop(heads) as h:
                place = _table_row(positions, b, s) if positions else 0
                _turn(rotation, source, let(x.at(b, h, s)), turned, 0, cos, sin, place, head_dim)
                step = round_codes(turned, codes_out, let(codes.at(b, h, slot)), head_dim)
                scale_out.put(scale.at(b, h, slot, 0), step, 1)
    return k.function


def _table(k: Any, rotation: Rotation, positions: Layout) -> tuple[Flat, Flat]:
    shape = (*positions.shape, rotation.half)
    return k.read("cos", shape, "float32"), k.read("sin", shape, "float32")


def _table_row(positions: Layout, batch: Any, place: Any) -> Any:
    """Row of the table; positions that all sequences share have one batch."""
    rows, length = positions.shape
    return place if isinstance(rows, int) and rows == 1 else batch * length + place


def _turn(
    rotation: Rotation, x: Flat, start: Any, out: Flat, target: Any, cos: Any, sin: Any, row: Any, head_dim: int
) -> None:
    """One head of one token."""
    half = rotation.half
    if half:
        _turn_pairs(rotation, x, start, out, target, cos, sin, let(row * half))
    lanes = widest(head_dim - 2 * half)
    with loop((head_dim - 2 * half) // lanes) as i:
        at = 2 * half + i * lanes
        out.put(target + at, _as(out, x.vec(start + at, lanes), lanes), lanes)


def _turn_pairs(
    rotation: Rotation, x: Flat, start: Any, out: Flat, target: Any, cos: Flat, sin: Flat, base: Any
) -> None:
    half = rotation.half
    lanes = 1 if rotation.interleaved else widest(half)
    with loop(half // lanes) as i:
        pair = i * lanes
        first, second = (2 * pair, 2 * pair + 1) if rotation.interleaved else (pair, pair + half)
        a, b = let(x.vec(start + first, lanes)), let(x.vec(start + second, lanes))
        c, s = let(cos.vec(base + pair, lanes)), let(sin.vec(base + pair, lanes))
        out.put(target + first, _as(out, a * c - b * s, lanes), lanes)
        out.put(target + second, _as(out, b * c + a * s, lanes), lanes)


def _as(out: Flat, value: Any, lanes: int) -> Any:
    if out.dtype == "float32":
        return value
    return tirx.Cast(f"{out.dtype}x{lanes}" if lanes > 1 else out.dtype, value)
