"""Activations in floating point times weights in low-bit codes: a GEMV for one row, split-K for few, stream-K for more.

Frantar et al. 2022, GPTQ, arXiv:2210.17323, and Lin et al. 2023, AWQ, arXiv:2306.00978, for the scheme; layout in
`graphwright.packing`. A byte holds `parts` codes of one group, each from its own run of columns: one load serves as
many matrix products, on contiguous runs of the activations. Codes of three bits lie in two planes, of low bits and of
high ones, which are put together as they are read. Codes stand for (code - zero_point) * scale, or, with a
table, for table[code] * scale: NormalFloat (Dettmers et al. 2023, arXiv:2305.14314) and FP4 in blocks of 32 (OCP
Microscaling Formats 1.0).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright import packing
from graphwright.contract import dtype_name
from graphwright.errors import BackendError
from graphwright.kernels.triton import stream_k
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

PARTS = {"int8": 1, "int4": 2, "int3": 4, "int2": 4, "nf4": 2, "mxfp4": 2}
"""Codes in a byte by weight format; of int3 their low two bits, and a byte of the plane behind them holds the high bits
of twice as many. Codes of the last two stand for the entries of a table."""

MOST_SPLITS = 16
MOST_SPLIT_ROWS = 64
"""Rows up to which all tiles of a weight's outputs are split alike; more rows are streamed."""
GROUP_SIZES = (16, 32768)
"""The smallest and largest group that a kernel serves."""


@triton.jit
def load_high(plane, within, mask, RUN: tl.constexpr):
    """Bytes whose bit 2 * part is the high bit of the three-bit code at `within` in run `part` of a group.

    The high bits of a run of low ones are two runs of their own, half as long.
    """
    half: tl.constexpr = RUN // 2
    return tl.load(plane + within % half, mask=mask, other=0).to(tl.int32) >> (within // half)


@triton.jit
def decode(byte, high, part, table_ptr, scale, offset, PARTS: tl.constexpr):
    """Weights in float32 from bytes; `scale` and `offset` = -zero_point * scale broadcast to them.

    `high` is what `load_high` gives, or None where the codes lie in one plane.
    """
    if PARTS == 1:
        codes = byte
    else:
        codes = (byte.to(tl.int32) >> (part * (8 // PARTS))) & ((1 << (8 // PARTS)) - 1)
    if high is not None:
        codes = codes | (((high >> (2 * part)) & 1) << 2)
    if table_ptr is not None:
        weights = tl.load(table_ptr + codes.to(tl.int32)) * scale
    else:
        weights = codes.to(tl.float32) * scale + offset
    return weights


@triton.jit
def multiply(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, row, output, start, end, rows, x_row, outputs, features, groups,
    PARTS: tl.constexpr, HIGH: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Float32 sums [BLOCK_M, BLOCK_N] over the chunks `start` … `end` of the groups, for some rows and outputs."""
    run: tl.constexpr = GROUP_SIZE // PARTS
    stride: tl.constexpr = run + run // 2 if HIGH else run
    wanted = output < outputs
    column = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    weight_at = weight_ptr + output.to(tl.int64)[None, :] * (groups * stride)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(start, end):
        group = step // CHUNKS
        within = step % CHUNKS * BLOCK_K + column
        weight_mask = wanted[None, :]
        if not EVEN:
            weight_mask = weight_mask & (within[:, None] < run)
        byte = tl.load(weight_at + (group * stride + within)[:, None], mask=weight_mask, other=0)
        high = None
        if HIGH:
            high = load_high(weight_at + group * stride + run, within[:, None], weight_mask, run)
        scale = tl.load(scale_ptr + output * groups + group, mask=wanted, other=0.0).to(tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + output * groups + group, mask=wanted, other=0.0).to(tl.float32)
        else:
            zero = tl.full([BLOCK_N], SYMMETRIC_ZERO, tl.float32)
        offset = (-zero * scale)[None, :]
        for part in tl.static_range(PARTS):
            feature = group * GROUP_SIZE + part * run + within
            inside = (row[:, None] < rows) & (feature[None, :] < features)
            if not EVEN:
                inside = inside & (within[None, :] < run)
            x = tl.load(x_at + feature[None, :], mask=inside, other=0.0)
            weight = decode(byte, high, part, table_ptr, scale[None, :], offset, PARTS)
            total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    return total


@triton.jit
def gemm(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr,
    rows, x_row, outputs, features, groups, steps,
    PARTS: tl.constexpr, HIGH: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result over `steps` chunks of the groups; split-K gives each split its own result."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    total = multiply(
        x_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, row, output,
        split * steps, tl.minimum((split + 1) * steps, groups * CHUNKS), rows, x_row, outputs, features, groups,
        PARTS, HIGH, GROUP_SIZE, SYMMETRIC_ZERO, CHUNKS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if FINISH and bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    here = (split.to(tl.int64) * rows + row)[:, None] * outputs + output[None, :]
    stored = (row[:, None] < rows) & (output < outputs)[None, :]
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def stream_gemm(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr, parts_ptr,
    rows, x_row, outputs, features, groups,
    PARTS: tl.constexpr, HIGH: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """An even share of the steps of all tiles; what is cut goes to `parts_ptr`, for `stream_k.join`."""
    steps = groups * CHUNKS
    high_tiles = tl.cdiv(rows, BLOCK_M)
    every = high_tiles * tl.cdiv(outputs, BLOCK_N) * steps
    share = tl.cdiv(every, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, every)
    for tile in range(first // steps, tl.cdiv(last, steps)):
        start = tl.maximum(first - tile * steps, 0)
        end = tl.minimum(last - tile * steps, steps)
        place, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        row, output = tile % high_tiles * BLOCK_M + place, tile // high_tiles * BLOCK_N + column
        total = multiply(
            x_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, row, output, start, end,
            rows, x_row, outputs, features, groups,
            PARTS, HIGH, GROUP_SIZE, SYMMETRIC_ZERO, CHUNKS, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if end - start == steps:
            if bias_ptr is not None:
                total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
            stored = (row[:, None] < rows) & (output < outputs)[None, :]
            target = out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :]
            tl.store(target, total.to(out_ptr.dtype.element_ty), mask=stored)
        else:
            # A program begins one tile in its middle at most, and leaves one unfinished: a place for each.
            part = 2 * tl.program_id(0) + (start == 0).to(tl.int32)
            # Offsets that were the same for every tile would be kept in registers through the product.
            part_row = part * BLOCK_M + place
            tl.store(parts_ptr + part_row[:, None] * BLOCK_N + column[None, :], total)


@triton.jit
def gemv(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr,
    outputs, features, groups,
    PARTS: tl.constexpr, HIGH: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some outputs of one row: products are summed within a group before its scale is applied once."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    run: tl.constexpr = GROUP_SIZE // PARTS
    stride: tl.constexpr = run + run // 2 if HIGH else run
    wanted = output < outputs
    member, column = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_GROUPS], tl.float32)
    weight_at = weight_ptr + output.to(tl.int64)[:, None, None] * (groups * stride)
    for first in range(0, groups, BLOCK_GROUPS):
        group = first + member
        known = wanted[:, None] & (group < groups)[None, :]
        scale = tl.load(scale_ptr + output[:, None] * groups + group[None, :], mask=known, other=0.0).to(tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + output[:, None] * groups + group[None, :], mask=known, other=0.0).to(tl.float32)
        else:
            zero = tl.full([BLOCK_N, BLOCK_GROUPS], SYMMETRIC_ZERO, tl.float32)
        for chunk in range(CHUNKS):
            within = chunk * BLOCK_K + column
            place = group[:, None] * stride + within[None, :]
            mask = known[:, :, None]
            if not EVEN:
                mask = mask & (within < run)[None, None, :]
            byte = tl.load(weight_at + place[None, :, :], mask=mask, other=0)
            high = None
            if HIGH:
                plane = weight_at + (group * stride + run)[None, :, None]
                high = load_high(plane, within[None, None, :], mask, run)
            for part in tl.static_range(PARTS):
                feature = group[:, None] * GROUP_SIZE + part * run + within[None, :]
                inside = feature < features
                if not EVEN:
                    inside = inside & (within[None, :] < run)
                x = tl.load(x_ptr + feature, mask=inside, other=0.0).to(tl.float32)
                codes = decode(byte, high, part, table_ptr, 1.0, 0.0, PARTS)
                products = tl.sum(codes * x[None, :, :], axis=2)
                if table_ptr is not None:
                    total += scale * products
                else:
                    total += scale * (products - zero * tl.sum(x, axis=1)[None, :])
    result = tl.sum(total, axis=1)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + output, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def join(parts_ptr, bias_ptr, out_ptr, numel, outputs, splits, BLOCK: tl.constexpr):
    """The sum of the splits, and the bias."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < numel
    total = tl.zeros([BLOCK], tl.float32)
    part_at = parts_ptr + item
    for _ in range(splits):
        total += tl.load(part_at, mask=inside, other=0.0)
        part_at += numel
    if bias_ptr is not None:
        total += tl.load(bias_ptr + item % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + item, total.to(out_ptr.dtype.element_ty), mask=inside)


def quantized_linear(
    run: Runner,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """See `graphwright.ops.quantized_linear`.

    Raises:
        BackendError: a format or group size without a kernel.
    """
    if format not in PARTS:
        raise BackendError(f"No kernel multiplies {format} weights", fix=f"There are kernels for {', '.join(PARTS)}")
    zero, high, table = float(packing.FORMATS[format].zero), format == "int3", table_of(format, x.device)
    return linear(
        run, x, weight, scale, zero_point, bias, PARTS[format], group_size, symmetric_zero=zero, table=table, high=high
    )


@functools.lru_cache
def table_of(format: str, device: torch.device) -> Tensor | None:
    """Float32 values of a format's codes on a device, copied there once; None where codes are numbers themselves."""
    values = packing.FORMATS[format].table
    return torch.tensor(values, dtype=torch.float32, device=device) if values else None


def linear(
    run: Runner,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    parts: int,
    group_size: int,
    *,
    symmetric_zero: float = 0.0,
    table: Tensor | None = None,
    high: bool = False,
) -> Tensor:
    """`x` [..., K] times weights [N, K] of `parts` codes to a byte, [..., N] in the dtype of `x`.

    Args:
        run: runs the launches.
        x: floating point.
        weight: bytes [N, G * group_size / parts]; with `high` [N, G * group_size * 3 / 8].
        scale: [N, G].
        zero_point: [N, G], or None for `symmetric_zero`.
        bias: [N] or None.
        parts: codes in a byte: 1 (int8), 2 or 4.
        group_size: codes that share a scale.
        symmetric_zero: the code that stands for zero without zero points.
        table: float32 values of the codes, or None where the code itself is the value.
        high: whether each group's codes, four to a byte, are followed by a plane of their third bits.

    Raises:
        BackendError: a group size that no kernel serves.
    """
    _check(x, weight, scale, bias, parts, group_size, high)
    flat = rows_of(x)
    rows, features = flat.shape
    outputs, groups = weight.shape[0], scale.shape[1]
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    arguments: dict[str, Any] = {
        "x_ptr": flat, "weight_ptr": weight, "scale_ptr": scale, "zero_ptr": zero_point, "table_ptr": table,
        "bias_ptr": bias, "out_ptr": out, "outputs": outputs, "features": features, "groups": groups,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "PARTS": parts, "HIGH": high, "GROUP_SIZE": group_size, "SYMMETRIC_ZERO": symmetric_zero,
    }  # fmt: skip
    if rows == 1:
        _gemv(run, arguments, constants, weight, outputs, groups)
    else:
        arguments |= {"rows": rows, "x_row": flat.stride(0)}
        product = _gemm if rows <= MOST_SPLIT_ROWS else _stream_gemm
        product(run, arguments, constants, x, out, bias)
    return out


def _check(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, parts: int, group_size: int, high: bool
) -> None:
    check_device(x=x, weight=weight, scale=scale, bias=bias)
    smallest, largest = GROUP_SIZES
    unit = 8 if high else parts
    if not smallest <= group_size <= largest or group_size % unit:
        raise BackendError(
            f"No kernel serves groups of {group_size}",
            fix=f"There are kernels for {smallest} to {largest}, in multiples of {unit}",
        )
    if weight.shape[1] != scale.shape[1] * (group_size // parts + (group_size // 8 if high else 0)):
        raise BackendError(
            f"A weight of {weight.shape[1]} bytes a row does not hold {scale.shape[1]} groups of {group_size}"
        )
    if not (weight.is_contiguous() and scale.is_contiguous()):
        raise BackendError("Packed weights and their scales must be contiguous", fix="Call contiguous() on them")


def _gemv(
    run: Runner, arguments: dict[str, Any], constants: dict[str, Any], weight: Tensor, outputs: int, groups: int
) -> None:
    run_length = constants["GROUP_SIZE"] // constants["PARTS"]
    block = min(next_power_of_2(run_length), 1024)
    row_bytes = weight.shape[1] + 4 * groups
    run(
        Launch(
            gemv,
            arguments,
            {**constants, "CHUNKS": cdiv(run_length, block), "EVEN": run_length % block == 0, "BLOCK_K": block},
            _gemv_configs(block),
            lambda c: (cdiv(outputs, c["BLOCK_N"]),),
            lambda c: Work(
                2 * c["BLOCK_N"] * groups * constants["GROUP_SIZE"],
                c["BLOCK_N"] * row_bytes,
                in_flight=c["BLOCK_N"] * c["BLOCK_GROUPS"] * block,
            ),
            static=frozenset(("outputs", "features", "groups")),
        )
    )  # fmt: skip


def _gemv_configs(block: int) -> tuple[Config, ...]:
    """Rows of weights and groups that a block reads at a time: a few kilobytes in flight in every warp."""
    together = [max(1, 256 // block), max(1, 1024 // block)]
    return tuple(
        Config.of(warps, 2, BLOCK_N=outputs, BLOCK_GROUPS=groups)
        for outputs, warps in ((4, 4), (8, 4), (2, 2), (8, 8), (2, 4))
        for groups in dict.fromkeys(together)
    )


def _gemm(
    run: Runner, arguments: dict[str, Any], constants: dict[str, Any], x: Tensor, out: Tensor, bias: Tensor | None
) -> None:
    rows, outputs = arguments["rows"], arguments["outputs"]
    constants, steps = _in_steps(constants, arguments["groups"], run.device, rows, x.dtype)
    splits = split_k(rows, outputs, steps, run.device)
    per_split = cdiv(steps, splits)
    splits = cdiv(steps, per_split)
    finish = splits == 1
    parts = out if finish else torch.empty(splits, rows, outputs, dtype=torch.float32, device=out.device)
    run(
        Launch(
            gemm,
            {**arguments, "steps": per_split, "out_ptr": parts, "bias_ptr": bias if finish else None},
            {**constants, "FINISH": finish},
            configs(run.device, rows, x.dtype),
            lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(outputs, c["BLOCK_N"]), splits),
            lambda c: _step(x.dtype, constants).work(c, per_split),
            matrix=x.dtype != torch.float32,
            static=frozenset(("outputs", "features", "groups", "x_row")),
        )
    )
    if not finish:
        join_splits(run, parts, bias, out)


def _stream_gemm(
    run: Runner, arguments: dict[str, Any], constants: dict[str, Any], x: Tensor, out: Tensor, bias: Tensor | None
) -> None:
    rows, outputs, device = arguments["rows"], arguments["outputs"], run.device
    constants, steps = _in_steps(constants, arguments["groups"], device, rows, x.dtype)
    step, choices = _step(x.dtype, constants), configs(device, rows, x.dtype)
    counts = {config: stream_k.programs(rows, outputs, steps, config, device, step) for config in choices}
    parts = stream_k.room(counts, rows, outputs, out)
    used = run(
        Launch(
            stream_gemm,
            {**arguments, "parts_ptr": parts},
            constants,
            choices,
            lambda c: (counts[c],),
            lambda c: step.work(c, steps * stream_k.tiles(rows, outputs, c) / counts[c]),
            matrix=x.dtype != torch.float32,
            static=frozenset(("outputs", "features", "groups", "x_row")),
        )
    )
    stream_k.join_tiles(run, parts, bias, out, rows, steps, counts[used], used)


def _in_steps(
    constants: dict[str, Any], groups: int, device: Device, rows: int, dtype: torch.dtype
) -> tuple[dict[str, Any], int]:
    """The constants with those that cut the groups into steps, and the number of steps."""
    run_length = constants["GROUP_SIZE"] // constants["PARTS"]
    block = max(16, min(next_power_of_2(run_length), _deepest(device, rows, dtype)))
    chunks = cdiv(run_length, block)
    return {**constants, "CHUNKS": chunks, "EVEN": run_length % block == 0, "BLOCK_K": block}, groups * chunks


def _deepest(device: Device, rows: int, dtype: torch.dtype) -> int:
    """Bytes of a weight's row in one step: what decoded weights leave of the registers."""
    if dtype == torch.float32:
        return 16
    return 32 if device.matrix_unit in ("mma", "wmma") and rows > 16 else 64


def join_splits(run: Runner, parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Sums float32 [splits, rows, N] and adds the bias into `out`."""
    numel, outputs = out.numel(), out.shape[-1]
    run(
        Launch(
            join,
            {"parts_ptr": parts, "bias_ptr": bias, "out_ptr": out, "numel": numel, "outputs": outputs,
             "splits": parts.shape[0]},
            {},
            (Config.of(4, BLOCK=1024), Config.of(4, BLOCK=512)),
            lambda c: (cdiv(numel, c["BLOCK"]),),
            lambda c: Work(parts.shape[0] * c["BLOCK"], 4 * (parts.shape[0] + 1) * c["BLOCK"]),
            static=frozenset(("outputs",)),
        )
    )  # fmt: skip


def split_k(rows: int, outputs: int, steps: int, device: Device) -> int:
    """Splits of the inner dimension that give every unit of the device work when there are few tiles."""
    if rows > MOST_SPLIT_ROWS:
        return 1
    return max(1, min(2 * device.units // cdiv(outputs, 64), steps // 4, MOST_SPLITS))


def configs(device: Device, rows: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Tiles by class of rows: up to 16, up to 64, more."""
    if dtype == torch.float32:
        # Without matrix instructions every product is an instruction of its own: large tiles only cost registers.
        return tuple(Config.of(4, 2, BLOCK_M=16 if rows <= 16 else 32, BLOCK_N=n) for n in (64, 32))
    deep = 2 if device.target.kind == "rocm" else 4
    if device.matrix_unit == "wmma" and rows > 16:
        tiles = [(64, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 1), (32, 32, 4, 1), (16, 64, 4, 1)]
    elif rows <= 16:
        tiles = [(16, 64, 4, deep), (16, 128, 4, deep), (16, 32, 4, deep), (16, 64, 4, 2), (16, 64, 4, 1)]
    elif rows <= 64:
        tiles = [(64, 64, 4, deep), (32, 64, 4, deep), (64, 128, 4, deep), (64, 64, 4, 2), (32, 64, 4, 1)]
    else:
        tiles = [(128, 128, 8, 3), (128, 128, 4, 2), (128, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2)]
    return tuple(Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in dict.fromkeys(tiles))


@dataclass(frozen=True)
class _Step:
    """What one step over the inner dimension does: `parts` products of depth `block`."""

    dtype: torch.dtype
    block: int
    parts: int
    high: bool

    def work(self, config: Config, steps: float) -> Work:
        """The work of a block that takes so many steps."""
        rows, outputs, size = config["BLOCK_M"], config["BLOCK_N"], self.dtype.itemsize
        features = self.block * self.parts
        code = 1 / self.parts + (1 / 8 if self.high else 0)
        moved = features * (outputs * code + rows * size / 4)
        flight = features * (outputs * code + rows * size) * max(1, config.num_stages - 1)
        return Work(2 * rows * outputs * features * steps, moved * steps, dtype_name(self.dtype), flight)


def _step(dtype: torch.dtype, constants: Mapping[str, Any]) -> _Step:
    return _Step(dtype, constants["BLOCK_K"], constants["PARTS"], constants["HIGH"])


def _shape(run: Runner, dtype: torch.dtype, rows: int, format: str, group_size: int, zero: bool = True) -> Tensor:
    features, outputs = 4096, 4096
    scale = meta(torch.float16, outputs, features // group_size)
    storage = torch.int8 if format == "int8" else torch.uint8
    weight = meta(storage, outputs, features * packing.FORMATS[format].bits // 8)
    point = scale if zero else None
    return quantized_linear(run, meta(dtype, rows, features), weight, scale, point, None, format, group_size)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "int4 group 128, 1 row": lambda run, dtype: _shape(run, dtype, 1, "int4", 128),
    "int4 group 128, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int4", 128),
    "int4 group 128, 64 rows": lambda run, dtype: _shape(run, dtype, 64, "int4", 128),
    "int4 group 128, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int4", 128),
    "int4 group 32, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int4", 32),
    "int3 group 128, 1 row": lambda run, dtype: _shape(run, dtype, 1, "int3", 128),
    "int3 group 128, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int3", 128),
    "int3 group 128, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int3", 128),
    "int2 group 64, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int2", 64),
    "int2 group 64, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int2", 64),
    "int8 per row, 1 row": lambda run, dtype: _shape(run, dtype, 1, "int8", 4096, zero=False),
    "int8 per row, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int8", 4096, zero=False),
    "nf4 group 64, 1 row": lambda run, dtype: _shape(run, dtype, 1, "nf4", 64, zero=False),
    "nf4 group 64, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "nf4", 64, zero=False),
    "nf4 group 64, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "nf4", 64, zero=False),
    "mxfp4 group 32, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "mxfp4", 32, zero=False),
}
