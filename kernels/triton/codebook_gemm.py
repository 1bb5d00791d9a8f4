"""Products with weights that are rows of codebooks, and with the few weights that are kept apart at full precision.

Egiazarian et al. 2024, AQLM, arXiv:2401.06118: eight consecutive weights are the sum of one entry of each codebook,
times a scale per output. Dettmers et al. 2023, SpQR, arXiv:2306.03078: outliers are stored as rows of a sparse matrix
and added to the product of the rest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.launch import Config, Launch, Runner, Work, cdiv, check_device, meta, rows_of

ENTRY = 8
"""Weights of one entry."""


@triton.jit
def codebook_gemm(
    x_ptr, codes_ptr, table_ptr, scale_ptr, bias_ptr, out_ptr, rows, x_row, outputs, groups, entries,
    BOOKS: tl.constexpr, ENTRY: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result; BLOCK_K counts entries. Codebooks are small and stay in the caches."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = output < outputs
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, groups, BLOCK_K):
        group = first + inner
        mask, x_mask = wanted[None, :], row[:, None] < rows
        if not EVEN:
            mask = mask & (group[:, None] < groups)
            x_mask = x_mask & (group[None, :] < groups)
        for place in tl.static_range(ENTRY):
            weight = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
            for book in tl.static_range(BOOKS):
                at = (output.to(tl.int64)[None, :] * groups + group[:, None]) * BOOKS + book
                code = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.int32)
                weight += tl.load(table_ptr + (book * entries + code) * ENTRY + place, mask=mask, other=0.0).to(
                    tl.float32
                )
            x = tl.load(x_at + (ENTRY * group + place)[None, :], mask=x_mask, other=0.0)
            total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    total *= tl.load(scale_ptr + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    stored = (row[:, None] < rows) & wanted[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def add_outliers(
    x_ptr, ends_ptr, columns_ptr, values_ptr, out_ptr, rows, x_row, outputs,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds to one output of some rows what the outliers of its weights contribute."""
    output = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.load(ends_ptr + output - 1, mask=output > 0, other=0).to(tl.int32)
    end = tl.load(ends_ptr + output).to(tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_K):
        item = first + tl.arange(0, BLOCK_K)
        column = tl.load(columns_ptr + item, mask=item < end, other=0).to(tl.int64)
        value = tl.load(values_ptr + item, mask=item < end, other=0.0).to(tl.float32)
        inside = (row[:, None] < rows) & (item < end)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32) * value[None, :], axis=1)
    if end > start:
        target = out_ptr + row.to(tl.int64) * outputs + output
        before = tl.load(target, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(target, (before + total).to(out_ptr.dtype.element_ty), mask=row < rows)


def linear(
    run: Runner, x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """`x` [..., K] times codebook weights, plus bias [N]; in the dtype of `x`.

    Args:
        run: runs the launches.
        x: floating point.
        codes: uint8 or int16 [N, K / 8, books], below the number of entries.
        table: [books, entries, 8].
        scale: [N].
        bias: [N] or None.

    Raises:
        BackendError: entries of another width, or shapes that do not fit.
    """
    check_device(x=x, codes=codes, table=table, scale=scale, bias=bias)
    flat = rows_of(x)
    rows = flat.shape[0]
    outputs, groups, books = codes.shape
    if table.shape[2] != ENTRY:
        raise BackendError(f"No kernel has codebook entries of {table.shape[2]}", fix=f"There is one for {ENTRY}")
    if flat.shape[1] != ENTRY * groups or table.shape[0] != books:
        raise BackendError(f"x has {flat.shape[1]} columns and the weight {ENTRY * groups} in {books} codebooks")
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    block = 16
    run(
        Launch(
            codebook_gemm,
            {"x_ptr": flat, "codes_ptr": codes, "table_ptr": table, "scale_ptr": scale, "bias_ptr": bias,
             "out_ptr": out, "rows": rows, "x_row": flat.stride(0), "outputs": outputs, "groups": groups,
             "entries": table.shape[1]},
            {"BOOKS": books, "ENTRY": ENTRY, "EVEN": groups % block == 0, "BLOCK_K": block},
            tuple(
                Config.of(warps, stages, BLOCK_M=min(m, 16 if rows <= 16 else m), BLOCK_N=n)
                for m, n, warps, stages in ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (16, 16, 2, 1))
            ),
            lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(outputs, c["BLOCK_N"])),
            lambda c: Work(
                2 * c["BLOCK_M"] * c["BLOCK_N"] * groups * ENTRY,
                groups * (c["BLOCK_N"] * books * codes.element_size() + 2 * c["BLOCK_M"] * ENTRY),
                str(x.dtype).removeprefix("torch."),
            ),
            matrix=x.dtype != torch.float32,
            static=frozenset(("x_row", "outputs", "groups")),
        )
    )  # fmt: skip
    return out


def linear_reference(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same over the dense weight."""
    parts = [table[book][codes[..., book].long()] for book in range(codes.shape[2])]
    dense = torch.stack(parts).float().sum(0).flatten(1) * scale.float()[:, None]
    return torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def outliers(run: Runner, out: Tensor, x: Tensor, ends: Tensor, columns: Tensor, values: Tensor) -> None:
    """Adds `x` [..., K] times a sparse weight to `out` [..., N] in place.

    Args:
        run: runs the launches.
        out: contiguous.
        x: floating point.
        ends: int32 [N], the outlier after the last one of each output.
        columns: int32 [outliers], the column of each.
        values: [outliers].
    """
    check_device(out=out, x=x, ends=ends, columns=columns, values=values)
    flat = rows_of(x)
    rows, outputs = flat.shape[0], ends.shape[0]
    each = max(1, values.shape[0] // outputs)
    run(
        Launch(
            add_outliers,
            {"x_ptr": flat, "ends_ptr": ends, "columns_ptr": columns, "values_ptr": values, "out_ptr": out,
             "rows": rows, "x_row": flat.stride(0), "outputs": outputs},
            {},
            (Config.of(4, BLOCK_M=16, BLOCK_K=64), Config.of(1, BLOCK_M=16, BLOCK_K=32)),
            lambda c: (outputs, cdiv(rows, c["BLOCK_M"])),
            lambda c: Work(2 * c["BLOCK_M"] * each, each * (6 + c["BLOCK_M"] * x.element_size())),
            static=frozenset(("x_row", "outputs")),
        )
    )  # fmt: skip


def _shape(run: Runner, dtype: torch.dtype, rows: int) -> Tensor:
    table, codes = meta(dtype, 2, 256, ENTRY), meta(torch.uint8, 4096, 512, 2)
    return linear(run, meta(dtype, rows, 4096), codes, table, meta(dtype, 4096), None)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "two codebooks, 16 rows": lambda run, dtype: _shape(run, dtype, 16),
    "two codebooks, 512 rows": lambda run, dtype: _shape(run, dtype, 512),
    "outliers": lambda run, dtype: outliers(
        run, meta(dtype, 16, 4096), meta(dtype, 16, 4096), meta(torch.int32, 4096), meta(torch.int32, 160000),
        meta(dtype, 160000),
    ),
}  # fmt: skip
