"""Matrix products of consecutive groups of rows with a weight each, and the moves of rows around them.

Gale et al. 2022, MegaBlocks, arXiv:2211.15841. A block finds its expert from the group ends on the device: no sizes
travel to the host, and experts without rows cost nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    next_power_of_2,
    rows_of,
)

MOST_EXPERTS = 1024


@triton.jit
def grouped_gemm(
    x_ptr, weight_ptr, ends_ptr, out_ptr, x_row, outputs, features, experts,
    EVEN: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's rows; the block number counts the tiles of all experts in order."""
    block = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.arange(0, BLOCK_EXPERTS)
    ends = tl.load(ends_ptr + expert, mask=expert < experts, other=0).to(tl.int32)
    starts = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert < experts), other=0).to(tl.int32)
    sizes = tl.maximum(ends - starts, 0)
    after = tl.cumsum((sizes + BLOCK_M - 1) // BLOCK_M, axis=0)
    mine = tl.sum((after <= block).to(tl.int32), axis=0)
    if mine < experts:
        tiles_before = tl.sum(tl.where(expert < mine, (sizes + BLOCK_M - 1) // BLOCK_M, 0), axis=0)
        start = tl.sum(tl.where(expert == mine, starts, 0), axis=0)
        end = tl.sum(tl.where(expert == mine, ends, 0), axis=0)
        row = start + (block - tiles_before) * BLOCK_M + tl.arange(0, BLOCK_M)
        inner = tl.arange(0, BLOCK_K)
        x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
        weight_at = weight_ptr + mine.to(tl.int64) * features * outputs + output[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, features, BLOCK_K):
            feature = first + inner
            x_mask, weight_mask = row[:, None] < end, output[None, :] < outputs
            if not EVEN:
                x_mask = x_mask & (feature[None, :] < features)
                weight_mask = weight_mask & (feature[:, None] < features)
            x = tl.load(x_at + feature[None, :], mask=x_mask, other=0.0)
            weight = tl.load(weight_at + feature.to(tl.int64)[:, None] * outputs, mask=weight_mask, other=0.0)
            total = tl.dot(x, weight, total, input_precision="ieee")
        stored = (row[:, None] < end) & (output[None, :] < outputs)
        here = row.to(tl.int64)[:, None] * outputs + output[None, :]
        tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def zero_rows(out_ptr, ends_ptr, outputs, experts, BLOCK_N: tl.constexpr):
    """Rows after the last group's end are zeros."""
    row = tl.program_id(0)
    if row >= tl.load(ends_ptr + experts - 1):
        output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        kind = out_ptr.dtype.element_ty
        zeros = tl.zeros([BLOCK_N], kind)
        tl.store(out_ptr + row.to(tl.int64) * outputs + output, zeros, mask=output < outputs)


@triton.jit
def place_choices(choices_ptr, order_ptr, ends_ptr, count, BLOCK: tl.constexpr):
    """The choices of one expert, in their order, behind those of the experts before it."""
    expert = tl.program_id(0)
    before = 0
    for first in range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        chosen = tl.load(choices_ptr + item, mask=item < count, other=2147483647).to(tl.int32)
        before += tl.sum((chosen < expert).to(tl.int32), axis=0)
    placed = before
    for first in range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        chosen = tl.load(choices_ptr + item, mask=item < count, other=2147483647).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        place = placed + tl.cumsum(mine, axis=0) - mine
        tl.store(order_ptr + place, item.to(tl.int64), mask=mine == 1)
        placed += tl.sum(mine, axis=0)
    tl.store(ends_ptr + expert, placed)


@triton.jit
def gather_rows(
    x_ptr, index_ptr, weight_ptr, out_ptr, x_row, width, per_row,
    COMBINE: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """out[r] = x[index[r]], or the weighted sum of `per_row` such rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    if COMBINE:
        part = tl.arange(0, BLOCK_PARTS)
        known = part < per_row
        source = tl.load(index_ptr + row * per_row + part, mask=known, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + row * per_row + part, mask=known, other=0.0).to(tl.float32)
        mask = known[:, None] & inside[None, :]
        x = tl.load(x_ptr + source[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        result = tl.sum(x * weight[:, None], axis=0)
    else:
        source = tl.load(index_ptr + row).to(tl.int64)
        result = tl.load(x_ptr + source * x_row + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + column, result.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_linear(run: Runner, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `graphwright.ops.grouped_linear`.

    Raises:
        BackendError: more experts than one block can look through.
    """
    check_device(x=x, weight=weight, ends=ends)
    experts, features, outputs = weight.shape
    if experts > MOST_EXPERTS:
        raise BackendError(f"No kernel serves {experts} experts", fix=f"There are kernels for up to {MOST_EXPERTS}")
    flat = rows_of(x)
    rows = flat.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    static = frozenset(("outputs", "features", "x_row"))
    block = 16 if x.dtype == torch.float32 else 64
    run(
        Launch(
            grouped_gemm,
            {
                "x_ptr": flat, "weight_ptr": weight.contiguous(), "ends_ptr": ends, "out_ptr": out,
                "x_row": flat.stride(0), "outputs": outputs, "features": features, "experts": experts,
            },
            {"EVEN": features % block == 0, "BLOCK_EXPERTS": next_power_of_2(experts), "BLOCK_K": block},
            configs(run.device, rows // experts, x.dtype),
            lambda c: (cdiv(rows, c["BLOCK_M"]) + experts, cdiv(outputs, c["BLOCK_N"])),
            lambda c: _work(c, features, x),
            matrix=x.dtype != torch.float32,
            static=static,
        )
    )  # fmt: skip
    run(
        Launch(
            zero_rows,
            {"out_ptr": out, "ends_ptr": ends, "outputs": outputs, "experts": experts},
            {},
            (Config.of(4, BLOCK_N=1024),),
            lambda c: (rows, cdiv(outputs, c["BLOCK_N"])),
            lambda c: Work(0, 8),
            static=frozenset(("outputs",)),
        )
    )
    return out


def sort_by_expert(run: Runner, choices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Positions int64 [R] of flat expert numbers `choices` [R], sorted by expert and stable, and int32 ends [E]."""
    check_device(choices=choices)
    count = choices.numel()
    order = torch.empty(count, dtype=torch.int64, device=choices.device)
    ends = torch.empty(experts, dtype=torch.int32, device=choices.device)
    run(
        Launch(
            place_choices,
            {"choices_ptr": choices.contiguous(), "order_ptr": order, "ends_ptr": ends, "count": count},
            {},
            tuple(Config.of(4, BLOCK=block) for block in (1024, 512)),
            lambda c: (experts,),
            lambda c: Work(6 * count, 2 * count * choices.element_size()),
        )
    )
    return order, ends


def permute(run: Runner, x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x [M, K] and index [R]: tokens to the order of their experts."""
    return _move(run, x, index, None, index.shape[0], 1)


def unpermute(run: Runner, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The sum over the k choices of x[index[t, k]] * weights[t, k], [T, K] from [R, K] and [T, k]."""
    return _move(run, x, index, weights, *index.shape)


def _move(run: Runner, x: Tensor, index: Tensor, weights: Tensor | None, rows: int, per_row: int) -> Tensor:
    check_device(x=x, index=index, weights=weights)
    flat = rows_of(x)
    width = flat.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    run(
        Launch(
            gather_rows,
            {"x_ptr": flat, "index_ptr": index.contiguous(), "weight_ptr": weights, "out_ptr": out,
             "x_row": flat.stride(0), "width": width, "per_row": per_row},
            {"COMBINE": weights is not None, "BLOCK_PARTS": next_power_of_2(per_row)},
            (Config.of(4, BLOCK_WIDTH=1024), Config.of(4, BLOCK_WIDTH=512), Config.of(8, BLOCK_WIDTH=2048)),
            lambda c: (rows, cdiv(width, c["BLOCK_WIDTH"])),
            lambda c: Work(2 * per_row * c["BLOCK_WIDTH"], (per_row + 1) * c["BLOCK_WIDTH"] * x.element_size()),
            static=frozenset(("x_row", "width")),
        )
    )  # fmt: skip
    return out


def configs(device: Device, rows: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Tiles by the rows that an expert gets on average."""
    if dtype == torch.float32:
        return tuple(Config.of(4, 2, BLOCK_M=16 if rows <= 16 else 32, BLOCK_N=n) for n in (64, 32))
    deep = 2 if device.target.kind == "rocm" else 3
    if rows <= 16:
        tiles = [(16, 64, 4, deep), (16, 128, 4, deep), (16, 64, 4, 2), (16, 32, 4, 1)]
    else:
        tiles = [(64, 128, 4, deep), (128, 128, 8, deep), (64, 64, 4, deep), (64, 64, 4, 1), (64, 32, 4, 1)]
    return tuple(Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in tiles)


def _work(config: Config, features: int, x: Tensor) -> Work:
    m, n, size = config["BLOCK_M"], config["BLOCK_N"], x.element_size()
    step = (m + n) * 64 * size * max(1, config.num_stages - 1)
    return Work(2 * m * n * features, (m / 4 + n) * features * size, str(x.dtype).removeprefix("torch."), step)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "8 experts, 16 rows": lambda run, dtype: grouped_linear(
        run, meta(dtype, 16, 4096), meta(dtype, 8, 4096, 1536), meta(torch.int32, 8)
    ),
    "8 experts, 4096 rows": lambda run, dtype: grouped_linear(
        run, meta(dtype, 4096, 4096), meta(dtype, 8, 4096, 1536), meta(torch.int32, 8)
    ),
    "sort": lambda run, dtype: sort_by_expert(run, meta(torch.int64, 1024), 64),
    "permute": lambda run, dtype: permute(run, meta(dtype, 512, 4096), meta(torch.int64, 1024)),
    "unpermute": lambda run, dtype: unpermute(
        run, meta(dtype, 1024, 4096), meta(torch.int64, 512, 2), meta(dtype, 512, 2)
    ),
}
