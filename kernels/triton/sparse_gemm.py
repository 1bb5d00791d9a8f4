"""Products with weights of which two in four are kept: half the bytes travel, and zeros are filled in on the chip.

Mishra et al. 2021, arXiv:2104.08378, for the pattern; `graphwright.sparsity` for the layout, `graphwright.packing` for
values in codes. First and second values lie in planes of their own, and four products run over the columns of equal
place, so weights load in contiguous runs. Few rows are bound by the bytes of the weight, which is what this saves;
dense instructions multiply, so many rows gain nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright import packing
from graphwright.errors import BackendError
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    cdiv,
    check_device,
    meta,
    rows_of,
)

PARTS = {"": 1, "int8": 1, "int4": 2}
"""Values in an element of storage by format."""


def serves(format: str, group_size: int) -> bool:
    """Whether there is a kernel for these codes."""
    return format in PARTS and (not format or (group_size > 0 and group_size % (4 * PARTS[format]) == 0))


@triton.jit
def kept_values(
    plane, column, scale, offset, mask,
    PARTS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The values of a plane at `column`; codes, which have a scale, are decoded to code * scale + offset in float32."""
    if scale is not None:
        if PARTS == 1:
            values = tl.load(plane + column, mask=mask, other=0).to(tl.float32)
        else:
            within = column % (PARTS * RUN)
            byte = tl.load(plane + column // (PARTS * RUN) * RUN + within % RUN, mask=mask, other=0).to(tl.int32)
            values = ((byte >> (within // RUN * (8 // PARTS))) & ((1 << (8 // PARTS)) - 1)).to(tl.float32)
        values = values * scale + offset
    else:
        values = tl.load(plane + column, mask=mask, other=0.0)
    return values


@triton.jit
def sparse_gemm(
    x_ptr, values_ptr, places_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    rows, x_row, outputs, columns, scales, place_row,
    PARTS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result; a column of the planes stands for four of the weight, GROUP of them share a scale."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = output < outputs
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    plane: tl.constexpr = PARTS
    first_at = values_ptr + output.to(tl.int64)[None, :] * (columns // plane * 2)
    second_at = first_at + columns // plane
    places_at = places_ptr + output.to(tl.int64)[None, :] * place_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, columns, BLOCK_K):
        column = first + inner
        mask, x_mask = wanted[None, :], row[:, None] < rows
        if not EVEN:
            mask = mask & (column[:, None] < columns)
            x_mask = x_mask & (column[None, :] < columns)
        scale, offset = None, None
        if GROUP > 0:
            if GROUP % BLOCK_K == 0:  # one scale serves the whole block
                scale_at, scale_mask = output[None, :] * scales + first // GROUP, wanted[None, :]
            else:
                scale_at, scale_mask = output[None, :] * scales + column[:, None] // GROUP, mask
            scale = tl.load(scale_ptr + scale_at, mask=scale_mask, other=0.0).to(tl.float32)
            if zero_ptr is not None:
                offset = -tl.load(zero_ptr + scale_at, mask=scale_mask, other=0.0).to(tl.float32) * scale
            else:
                offset = -SYMMETRIC_ZERO * scale
        pair = tl.load(places_at + column[:, None] // 2, mask=mask, other=0).to(tl.int32)
        places = pair >> (4 * (column[:, None] % 2))
        one = kept_values(first_at, column[:, None], scale, offset, mask, PARTS, GROUP // PARTS)
        two = kept_values(second_at, column[:, None], scale, offset, mask, PARTS, GROUP // PARTS)
        for place in tl.static_range(4):
            weight = tl.where((places & 3) == place, one, tl.where(((places >> 2) & 3) == place, two, 0.0))
            x = tl.load(x_at + (4 * column + place)[None, :], mask=x_mask, other=0.0)
            total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    stored = (row[:, None] < rows) & wanted[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=stored)


def linear(
    run: Runner,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """`x` [..., K] times the compressed weight, plus bias [N]; in the dtype of `x`.

    Arguments as `graphwright.ops.sparse_linear` of layout `2:4` has them.

    Raises:
        BackendError: widths that do not fit, or a format or group size that no kernel serves.
    """
    check_device(x=x, values=values, places=places, scale=scale, bias=bias)
    if not serves(format, group_size):
        raise BackendError(
            f"No kernel multiplies 2:4 weights in {format}, groups of {group_size}",
            fix="There are kernels for floating-point values, int8 in multiples of 4 and int4 in multiples of 8",
        )
    flat, parts = rows_of(x), PARTS[format]
    rows, outputs, columns = flat.shape[0], places.shape[0], values.shape[-1] * parts
    if flat.shape[1] != 4 * columns:
        raise BackendError(f"x has {flat.shape[1]} columns and the weight {4 * columns}")
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    group = group_size // 4 if format else 0
    block = _depth(run.device, x.dtype, group)
    zero = float(packing.FORMATS[format].zero) if format else 0.0
    run(
        Launch(
            sparse_gemm,
            {"x_ptr": flat, "values_ptr": values, "places_ptr": places, "scale_ptr": scale, "zero_ptr": zero_point,
             "bias_ptr": bias, "out_ptr": out, "rows": rows, "x_row": flat.stride(0), "outputs": outputs,
             "columns": columns, "scales": 0 if scale is None else scale.shape[1], "place_row": places.shape[1]},
            {"PARTS": parts, "GROUP": group, "SYMMETRIC_ZERO": zero, "EVEN": columns % block == 0, "BLOCK_K": block},
            configs(run.device, rows),
            lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(outputs, c["BLOCK_N"])),
            lambda c: _work(c, columns, x, values.element_size() / parts, group, block),
            matrix=x.dtype != torch.float32,
            static=frozenset(("x_row", "outputs", "columns", "scales", "place_row")),
        )
    )  # fmt: skip
    return out


def _depth(device: Device, dtype: torch.dtype, group: int) -> int:
    """Columns of the planes in one step: within one group of codes where that is deep enough to multiply."""
    most = 16 if dtype == torch.float32 or device.matrix_unit == "wmma" else 32
    return 16 if group % most else most


def configs(device: Device, rows: int) -> tuple[Config, ...]:
    """Tiles for up to 16 rows, and for more."""
    deep = 2 if device.target.kind == "rocm" else 3
    if rows <= 16:
        tiles = [(16, 64, 4, deep), (16, 32, 4, deep), (16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 2, 1)]
    else:
        tiles = [(64, 64, 4, deep), (64, 64, 8, deep), (64, 32, 4, 2), (32, 32, 4, 1), (64, 64, 8, 1)]
    return tuple(Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in tiles)


def _work(config: Config, columns: int, x: Tensor, value_bytes: float, group: int, block: int) -> Work:
    m, n, size = config["BLOCK_M"], config["BLOCK_N"], x.element_size()
    weight = 2 * value_bytes + 0.5 + (2 / group if group else 0)
    moved = columns * (n * weight + m * size)
    step = block * (n * (2 * value_bytes + 1) + 4 * m * size) * max(1, config.num_stages - 1)
    return Work(8 * m * n * columns, int(moved), str(x.dtype).removeprefix("torch."), int(step))


def _shape(run: Runner, dtype: torch.dtype, rows: int, format: str = "", group_size: int = 0) -> Tensor:
    x, places = meta(dtype, rows, 4096), meta(torch.uint8, 4096, 512)
    if not format:
        return linear(run, x, meta(dtype, 4096, 2, 1024), places, None, None, None, "", 0)
    values = meta(torch.int8 if format == "int8" else torch.uint8, 8192, 1024 // PARTS[format])
    scale = meta(torch.float16, 4096, 4096 // group_size)
    return linear(run, x, values, places, scale, None, None, format, group_size)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "16 rows": lambda run, dtype: _shape(run, dtype, 16),
    "512 rows": lambda run, dtype: _shape(run, dtype, 512),
    "int8 group 128, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int8", 128),
    "int4 group 128, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int4", 128),
    "int4 group 32, 512 rows": lambda run, dtype: _shape(run, dtype, 512, "int4", 32),
}
