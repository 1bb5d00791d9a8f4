"""The layout of quantized weights that CPU kernels stream, and its inverse.

A weight [N, K] of codes with groups of `group_size` is cut into tiles of 16 rows. Within a tile, groups follow each
other along K; within a group, four consecutive codes of each of the 16 rows make one 64-byte vector, so that a dot
product instruction adds four products per row:

- int8: uint8 [N/16, K/4, 16, 4], the code plus 128, so that the weight is the unsigned operand;
- int4: uint8 [N/16, K/8, 16, 4], codes k … k+3 of a row in the low nibbles and k+4 … k+7 in the high ones.

Floats stay floats: float32 [N/16, K, 16] as [N/16, K * 16].

Of a weight that keeps two in four, the kept values are such a matrix [N, K/2]. Their places in their groups of four are
int32 [N/16, K/32, 16]: two bits for each of the 16 values that a row has in 32 columns, those of value 4 i + j in bits
8 j + 2 i, so that a shift and a mask give the places of four values in the four bytes of a row.

Scales become [N/16, G, 16] and zero points uint8 [N/16, G, 16], offset like the codes. Rows are padded to whole tiles
with zero scales.
"""

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing, sparsity

ROWS = 16
"""Rows of a tile."""

OFFSET = {"int4": 0, "int8": 128}
"""What is added to a code so that it is unsigned."""

STEP = {"int4": 8, "int8": 4, "float32": 1}
"""Weights along K in one 64-byte vector of a tile; a group is a multiple of it."""


CHUNK = 32
"""Columns whose places in a 2:4 weight make one vector; a group of its scales is a multiple of it."""


def halves_fit(format: str, group_size: int) -> bool:
    """Whether a 2:4 weight can be cut into tiles; floats have no format."""
    return not format or (format in STEP and group_size % CHUNK == 0)


def fits(format: str, group_size: int) -> bool:
    """Whether a weight can be cut into tiles."""
    return format in STEP and group_size % STEP[format] == 0


def unsigned_zero(format: str) -> int:
    """The unsigned code of zero in a symmetric weight."""
    return packing.FORMATS[format].zero + OFFSET[format]


def tile_codes(packed: Tensor, format: str, group_size: int) -> Tensor:
    """Storage [N, …] of `graphwright.packing` as flat uint8 tiles [N/16, bytes of a tile]."""
    codes = packing.unpack(packed, format, group_size).to(torch.int16) + OFFSET[format]
    rows = _padded(codes.to(torch.uint8))
    quads = rows.unflatten(0, (-1, ROWS)).unflatten(2, (-1, STEP[format] // 4, 4))
    bytes_ = quads[:, :, :, 0] if format == "int8" else quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)
    return bytes_.transpose(1, 2).flatten(1).contiguous()


def untile_codes(tiles: Tensor, format: str, group_size: int, rows: int) -> Tensor:
    """Inverse of `tile_codes`, for `rows` rows."""
    quads = tiles.unflatten(1, (-1, ROWS, 4)).transpose(1, 2)
    parts = [quads] if format == "int8" else [quads & 15, quads >> 4]
    codes = torch.stack(parts, 3).flatten(2).flatten(0, 1)[:rows]
    return packing.pack(codes.to(torch.int16) - OFFSET[format], format, group_size)


def tile_floats(weight: Tensor) -> Tensor:
    """Weights [N, K] as [N/16, K * 16]."""
    return _padded(weight).unflatten(0, (-1, ROWS)).transpose(1, 2).flatten(1)


def untile_floats(tiles: Tensor, rows: int) -> Tensor:
    """Inverse of `tile_floats`, for `rows` rows."""
    return tiles.unflatten(1, (-1, ROWS)).transpose(1, 2).flatten(0, 1)[:rows]


def tile_halves(values: Tensor, format: str, group_size: int) -> Tensor:
    """Values of `graphwright.sparsity`, [N, 2, K/4] floats or packed [2 N, K/4] codes, as the tiles of a [N, K/2]."""
    if not format:
        return tile_floats(values.transpose(1, 2).flatten(1)).contiguous()
    codes = packing.unpack(values, format, group_size // 4).unflatten(0, (-1, 2)).transpose(1, 2).flatten(1)
    return tile_codes(packing.pack(codes, format, group_size // 2), format, group_size // 2)


def untile_halves(tiles: Tensor, format: str, group_size: int, rows: int) -> Tensor:
    """Inverse of `tile_halves`, for `rows` rows."""
    if not format:
        return untile_floats(tiles, rows).unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    codes = packing.unpack(untile_codes(tiles, format, group_size // 2, rows), format, group_size // 2)
    return packing.pack(codes.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1), format, group_size // 4)


def tile_places(places: Tensor, groups: int) -> Tensor:
    """Places of `graphwright.sparsity` for `groups` groups of four as int32 [N/16, K/32 * 16]."""
    flat = _padded(sparsity.unpack_places(places, groups).flatten(1))
    chunks = functional.pad(flat, (0, -flat.shape[1] % (CHUNK // 2))).unflatten(1, (-1, 4, 4)).int()
    shifts = 2 * torch.arange(4)[:, None] + 8 * torch.arange(4)
    words = (chunks << shifts).sum((2, 3), dtype=torch.int32)
    return words.unflatten(0, (-1, ROWS)).transpose(1, 2).flatten(1).contiguous()


def untile_places(tiles: Tensor, groups: int, rows: int) -> Tensor:
    """Inverse of `tile_places`, for `rows` rows."""
    words = tiles.unflatten(1, (-1, ROWS)).transpose(1, 2).flatten(0, 1)[:rows]
    shifts = 2 * torch.arange(4)[:, None] + 8 * torch.arange(4)
    flat = ((words[..., None, None] >> shifts) & 3).flatten(1)[:, : 2 * groups]
    return sparsity.pack_places(flat.unflatten(1, (-1, 2)))


def tile_groups(values: Tensor) -> Tensor:
    """Scales or zero points [N, G] as [N/16, G, 16]."""
    return _padded(values).unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def untile_groups(tiles: Tensor, rows: int) -> Tensor:
    """Inverse of `tile_groups`."""
    return tiles.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def tile_zero_points(zero_point: Tensor, format: str) -> Tensor:
    """Zero points [N, G] in codes as unsigned tiles."""
    return tile_groups((zero_point.to(torch.int16) + OFFSET[format]).to(torch.uint8))


def untile_zero_points(tiles: Tensor, format: str, rows: int) -> Tensor:
    """Inverse of `tile_zero_points`."""
    codes = untile_groups(tiles, rows).to(torch.int16) - OFFSET[format]
    return codes.to(packing.FORMATS[format].storage)


def _padded(values: Tensor) -> Tensor:
    missing = -values.shape[0] % ROWS
    return functional.pad(values, (0, 0, 0, missing)) if missing else values
