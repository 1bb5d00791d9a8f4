"""Products with weights of which two in four are kept: half the bytes travel, and zeros are filled in on the chip.

Mishra et al. 2021, arXiv:2104.08378, for the pattern; `graphwright.sparsity` for the layout. First and second values
lie in planes of their own, and four products run over the columns of equal place, so weights load in contiguous runs.
Few rows are bound by the bytes of the weight, which is what this saves; dense instructions multiply, so many rows gain
nothing.
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
    rows_of,
)
from graphwright.sparsity import expand


@triton.jit
def sparse_gemm(
    x_ptr, values_ptr, places_ptr, bias_ptr, out_ptr, rows, x_row, outputs, groups, place_row,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result; BLOCK_K counts groups of four columns."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = output < outputs
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    here = output.to(tl.int64)[None, :] * groups
    places_at = places_ptr + output.to(tl.int64)[None, :] * place_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, groups, BLOCK_K):
        group = first + inner
        mask, x_mask = wanted[None, :], row[:, None] < rows
        if not EVEN:
            mask = mask & (group[:, None] < groups)
            x_mask = x_mask & (group[None, :] < groups)
        pair = tl.load(places_at + group[:, None] // 2, mask=mask, other=0).to(tl.int32)
        places = pair >> (4 * (group[:, None] % 2))
        one = tl.load(values_ptr + 2 * here + group[:, None], mask=mask, other=0.0)
        two = tl.load(values_ptr + 2 * here + groups + group[:, None], mask=mask, other=0.0)
        for place in tl.static_range(4):
            weight = tl.where((places & 3) == place, one, tl.where(((places >> 2) & 3) == place, two, 0.0))
            x = tl.load(x_at + (4 * group + place)[None, :], mask=x_mask, other=0.0)
            total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    stored = (row[:, None] < rows) & wanted[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=stored)


def linear_reference(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """The same over the dense weight."""
    return torch.nn.functional.linear(x, expand(values, places), bias)


def linear(run: Runner, x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., K] times the compressed weight, plus bias [N]; in the dtype of `x`."""
    check_device(x=x, values=values, places=places, bias=bias)
    flat = rows_of(x)
    rows = flat.shape[0]
    outputs, _, groups = values.shape
    if flat.shape[1] != 4 * groups:
        raise BackendError(f"x has {flat.shape[1]} columns and the weight {4 * groups}")
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    block = 16 if x.dtype == torch.float32 or run.device.matrix_unit == "wmma" else 32
    run(
        Launch(
            sparse_gemm,
            {"x_ptr": flat, "values_ptr": values, "places_ptr": places, "bias_ptr": bias, "out_ptr": out,
             "rows": rows, "x_row": flat.stride(0), "outputs": outputs, "groups": groups,
             "place_row": places.shape[1]},
            {"EVEN": groups % block == 0, "BLOCK_K": block},
            configs(run.device, rows),
            lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(outputs, c["BLOCK_N"])),
            lambda c: _work(c, groups, x, block),
            matrix=x.dtype != torch.float32,
            static=frozenset(("x_row", "outputs", "groups", "place_row")),
        )
    )  # fmt: skip
    return out


def configs(device: Device, rows: int) -> tuple[Config, ...]:
    """Tiles for up to 16 rows, and for more."""
    deep = 2 if device.target.kind == "rocm" else 3
    if rows <= 16:
        tiles = [(16, 64, 4, deep), (16, 32, 4, deep), (16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 2, 1)]
    else:
        tiles = [(64, 64, 4, deep), (64, 64, 8, deep), (64, 32, 4, 2), (32, 32, 4, 1), (64, 64, 8, 1)]
    return tuple(Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in tiles)


def _work(config: Config, groups: int, x: Tensor, block: int) -> Work:
    m, n, size = config["BLOCK_M"], config["BLOCK_N"], x.element_size()
    moved = groups * (n * (2 * size + 0.5) + m * size)
    step = block * (n * (2 * size + 1) + 4 * m * size) * max(1, config.num_stages - 1)
    return Work(8 * m * n * groups, int(moved), str(x.dtype).removeprefix("torch."), step)


def _shape(run: Runner, dtype: torch.dtype, rows: int) -> Tensor:
    return linear(run, meta(dtype, rows, 4096), meta(dtype, 4096, 2, 1024), meta(torch.uint8, 4096, 512), None)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "16 rows": lambda run, dtype: _shape(run, dtype, 16),
    "512 rows": lambda run, dtype: _shape(run, dtype, 512),
}
