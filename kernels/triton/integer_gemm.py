"""Eight-bit products: int8 or fp8 activations with a scale per token, times int8, int4 or fp8 weights.

Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Xiao et al. 2022, SmoothQuant, arXiv:2211.10438; Micikevicius et
al. 2022, FP8 formats, arXiv:2209.05433. Integer products are exact in int32; a weight with one scale per row is summed
over all of K before it is scaled, one with groups is scaled group by group.
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
    next_power_of_2,
    rows_of,
)
from graphwright.kernels.triton.quantized_gemm import PARTS, join_splits, split_k

SHORTEST_RUN = 32
"""The inner dimension of an 8-bit matrix instruction."""


@triton.jit
def gemm(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    rows, x_row, x_scale_row, outputs, features, groups, steps,
    PARTS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr, PER_ROW: tl.constexpr, INTEGER: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result over `steps` chunks of the groups; split-K gives each split its own result."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    run: tl.constexpr = GROUP_SIZE // PARTS
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    nothing: tl.constexpr = 0 if INTEGER else 0.0
    wanted = output < outputs
    column = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    weight_at = weight_ptr + output.to(tl.int64)[None, :] * (groups * run)
    summed = tl.zeros([BLOCK_M, BLOCK_N], kind)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((split + 1) * steps, groups * CHUNKS)
    for step in range(split * steps, last):
        group = step // CHUNKS
        within = step % CHUNKS * BLOCK_K + column
        weight_mask = wanted[None, :]
        if not EVEN:
            weight_mask = weight_mask & (within[:, None] < run)
        byte = tl.load(weight_at + (group * run + within)[:, None], mask=weight_mask, other=nothing)
        if PARTS > 1:
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + output * groups + group, mask=wanted, other=0.0).to(tl.int32)[None, :]
            else:
                zero = tl.full([1, BLOCK_N], SYMMETRIC_ZERO, tl.int32)
        for part in tl.static_range(PARTS):
            feature = group * GROUP_SIZE + part * run + within
            inside = (row[:, None] < rows) & (feature[None, :] < features)
            if not EVEN:
                inside = inside & (within[None, :] < run)
            x = tl.load(x_at + feature[None, :], mask=inside, other=nothing)
            if PARTS > 1:
                weight = (((byte.to(tl.int32) >> (part * (8 // PARTS))) & ((1 << (8 // PARTS)) - 1)) - zero).to(tl.int8)
            else:
                weight = byte
            if INTEGER:
                summed = tl.dot(x, weight, summed, out_dtype=tl.int32)
            else:
                summed = tl.dot(x, weight, summed)
        if not PER_ROW:
            scale = tl.load(scale_ptr + output * groups + group, mask=wanted, other=0.0).to(tl.float32)
            total += summed.to(tl.float32) * scale[None, :]
            summed = tl.zeros([BLOCK_M, BLOCK_N], kind)
    if PER_ROW:
        scale = tl.load(scale_ptr + output, mask=wanted, other=0.0).to(tl.float32)
        total = summed.to(tl.float32) * scale[None, :]
    x_scale = tl.load(x_scale_ptr + row * x_scale_row, mask=row < rows, other=0.0).to(tl.float32)
    total = total * x_scale[:, None]
    if FINISH and bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    here = (split.to(tl.int64) * rows + row)[:, None] * outputs + output[None, :]
    stored = (row[:, None] < rows) & wanted[None, :]
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=stored)


def serves(format: str, group_size: int, asymmetric: bool) -> bool:
    """Whether weights of this layout can be multiplied in eight bits."""
    if format == "fp8_e4m3":
        return not asymmetric and group_size >= SHORTEST_RUN
    # An int8 code less its zero point takes nine bits.
    fits = format == "int4" or (format == "int8" and not asymmetric)
    return fits and group_size // PARTS[format] >= SHORTEST_RUN


def linear(
    run: Runner,
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """(codes * x_scale) @ dequantize(weight).T + bias.

    Args:
        run: runs the launches.
        codes: int8 [..., K] for int8 and int4 weights, e4m3 or the bits of it for fp8 weights.
        x_scale: float32 [..., 1], or [] for one scale for all tokens.
        weight: packed [N, K padded to groups]; of fp8, likewise the type or its bits.
        scale: [N, G].
        zero_point: [N, G] whole numbers, for int4, or None.
        bias: [N] or None.
        format: `int8`, `int4` or `fp8_e4m3`.
        group_size: weights that share a scale; K itself for one scale per row.
        dtype: of the result.

    Raises:
        BackendError: a layout or a device without a kernel.
    """
    check_device(codes=codes, x_scale=x_scale, weight=weight, scale=scale, bias=bias)
    fp8 = format == "fp8_e4m3"
    if fp8 and not run.device.fp8:
        raise BackendError(f"{run.device.name} has no fp8 matrix instructions", fix="Quantize to int8 instead")
    if not fp8 and not serves(format, group_size, zero_point is not None):
        raise BackendError(
            f"No kernel multiplies int8 activations with {format} weights in groups of {group_size}"
            + (" with zero points" if zero_point is not None else ""),
            fix="There are kernels for symmetric int8 and for int4, in groups of 64 and more",
        )
    if fp8:
        codes, weight = codes.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
    parts = 1 if fp8 else PARTS[format]
    flat = rows_of(codes)
    rows, features = flat.shape
    outputs, groups = weight.shape[0], scale.shape[1]
    out = torch.empty((*codes.shape[:-1], outputs), dtype=dtype, device=codes.device)
    run_length = group_size // parts
    block = max(SHORTEST_RUN, min(next_power_of_2(run_length), 128))
    chunks = cdiv(run_length, block)
    splits = split_k(rows, outputs, groups * chunks, run.device)
    steps = cdiv(groups * chunks, splits)
    splits = cdiv(groups * chunks, steps)
    finish = splits == 1
    parted = out if finish else torch.empty(splits, rows, outputs, dtype=torch.float32, device=out.device)
    run(
        Launch(
            gemm,
            {
                "x_ptr": flat, "x_scale_ptr": x_scale, "weight_ptr": weight, "scale_ptr": scale,
                "zero_ptr": zero_point, "bias_ptr": bias if finish else None, "out_ptr": parted, "rows": rows,
                "x_row": flat.stride(0), "x_scale_row": int(x_scale.dim() > 0), "outputs": outputs,
                "features": features, "groups": groups, "steps": steps,
            },
            {
                "PARTS": parts, "GROUP_SIZE": group_size, "CHUNKS": chunks, "EVEN": run_length % block == 0,
                "SYMMETRIC_ZERO": 0 if fp8 else packing.FORMATS[format].zero, "PER_ROW": groups == 1,
                "INTEGER": not fp8, "FINISH": finish, "BLOCK_K": block,
            },
            configs(run.device, rows),
            lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(outputs, c["BLOCK_N"]), splits),
            lambda c: _work(c, block * parts * steps, parts, fp8),
            matrix=True,
            static=frozenset(("outputs", "features", "groups", "x_row")),
        )
    )  # fmt: skip
    if not finish:
        join_splits(run, parted, bias, out)
    return out


def configs(device: Device, rows: int) -> tuple[Config, ...]:
    """Tiles by class of rows: up to 16, up to 64, more."""
    deep = 2 if device.target.kind == "rocm" else 4
    if device.matrix_unit == "wmma" and rows > 16:
        tiles = [(64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)]
    elif rows <= 16:
        tiles = [(16, 64, 4, deep), (16, 128, 4, deep), (16, 32, 4, deep), (16, 64, 4, 2), (16, 32, 4, 1)]
    elif rows <= 64:
        tiles = [(64, 64, 4, deep), (64, 128, 4, deep), (64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)]
    else:
        tiles = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 1)]
    return tuple(Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in dict.fromkeys(tiles))


def _work(config: Config, features: int, parts: int, fp8: bool) -> Work:
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    moved = n * features / parts + m * features / 4
    step = (n / parts + m) * 128 * max(1, config.num_stages - 1)
    return Work(2 * m * n * features, moved, "float8_e4m3fn" if fp8 else "int8", step)


def linear_reference(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same in float32 over dequantized operands."""
    if format == "fp8_e4m3":
        codes, weight = codes.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
        dense = (weight.float().unflatten(-1, (-1, group_size)) * scale.float()[..., None]).flatten(-2)
    else:
        dense = packing.dequantize(weight, scale, zero_point, format, group_size)
    result = (codes.float() * x_scale) @ dense[:, : codes.shape[-1]].T
    return (result if bias is None else result + bias.float()).to(dtype)


def _shape(run: Runner, dtype: torch.dtype, rows: int, format: str, group_size: int) -> Tensor:
    kinds = {"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn}
    features = outputs = 4096
    weight = meta(kinds[format], outputs, features // PARTS.get(format, 1))
    scale = meta(torch.float32, outputs, features // group_size)
    codes = meta(torch.float8_e4m3fn if format == "fp8_e4m3" else torch.int8, rows, features)
    return linear(run, codes, meta(torch.float32, rows, 1), weight, scale, None, None, format, group_size, dtype)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "int8 per row, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int8", 4096),
    "int8 per row, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int8", 4096),
    "int4 group 128, 16 rows": lambda run, dtype: _shape(run, dtype, 16, "int4", 128),
    "int4 group 128, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "int4", 128),
    "fp8 per row, 2048 rows": lambda run, dtype: _shape(run, dtype, 2048, "fp8_e4m3", 4096) if run.device.fp8 else None,
}
