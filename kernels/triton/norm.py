"""Root-mean-square and layer normalisation, with the residual sum before and the rounding to int8 after in one pass.

Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450. A row is read once and kept in registers,
so the traffic is the least there is: x and the residual in, the sum and the result out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    cdiv,
    check_device,
    fixed,
    meta,
    next_power_of_2,
    rows_of,
)
from graphwright.kernels.triton.rounding import quantize_rows
from graphwright.ops import rms_norm as rms_norm_op

LARGEST_ROW = 32768
"""A row has to fit the registers of one block."""


@triton.jit
def normalize(
    x_ptr, residual_ptr, sum_ptr, weight_ptr, bias_ptr, out_ptr, codes_ptr, scale_ptr,
    rows, x_row, residual_row, eps,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, UNIT_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    here = row[:, None].to(tl.int64)
    x = tl.load(x_ptr + here * x_row + column[None, :], mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + here * residual_row + column[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + here * WIDTH + column[None, :], x, mask=inside)
    wide = x.to(tl.float32)
    if CENTRED:
        mean = tl.sum(wide, axis=1) / WIDTH
        wide = tl.where(inside, wide - mean[:, None], 0.0)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)
        if CENTRED:
            normed = normed * weight.to(tl.float32)[None, :]
        elif UNIT_OFFSET:
            normed = normed * (1.0 + weight.to(tl.float32))[None, :]
        else:
            normed = normed.to(x.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    result = normed.to(x.dtype)
    if out_ptr is not None:
        tl.store(out_ptr + here * WIDTH + column[None, :], result, mask=inside)
    if codes_ptr is not None:
        codes, scale = quantize_rows(result.to(tl.float32), LARGEST)
        tl.store(codes_ptr + here * WIDTH + column[None, :], codes.to(tl.int8), mask=inside)
        tl.store(scale_ptr + row, scale, mask=row < rows)


def configs(width: int) -> tuple[Config, ...]:
    """Small rows share a block; a large one gets more warps."""
    block = next_power_of_2(width)
    together = [max(1, 1024 // block), max(1, 4096 // block)]
    # Eight warps first where there is work for them: they hide latency better at equal traffic.
    warps = [w for w in (8, 4, 16) if block * max(together) >= w * 256] or [4]
    return tuple(
        Config.of(num_warps=w, BLOCK_ROWS=rows, BLOCK_WIDTH=block) for rows in dict.fromkeys(together) for w in warps
    )


def _launch(
    run: Runner,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
    unit_offset: bool,
    quantize: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    width = x.shape[-1]
    if width > LARGEST_ROW:
        raise BackendError(
            f"Rows of {width} are normalised by no kernel", fix=f"The widest there is takes {LARGEST_ROW}"
        )
    check_device(x=x, residual=residual, weight=weight, bias=bias)
    flat = rows_of(x)
    added = None if residual is None else rows_of(residual)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = None if quantize else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device) if quantize else None
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if quantize else None
    rows = flat.shape[0]
    moved = width * x.element_size() * (2 if residual is None else 4)
    run(
        Launch(
            normalize,
            {
                "x_ptr": flat, "residual_ptr": added, "sum_ptr": total, "weight_ptr": weight, "bias_ptr": bias,
                "out_ptr": out, "codes_ptr": codes, "scale_ptr": scale, "rows": rows, "x_row": flat.stride(0),
                "residual_row": 0 if added is None else added.stride(0), "eps": float(eps),
            },
            {"WIDTH": width, "CENTRED": centred, "UNIT_OFFSET": unit_offset, "LARGEST": 127},
            configs(width),
            lambda c: (cdiv(rows, c["BLOCK_ROWS"]),),
            lambda c: Work(6 * c["BLOCK_ROWS"] * width, c["BLOCK_ROWS"] * moved),
            static=fixed(width, "x_row", "residual_row"),
        )
    )  # fmt: skip
    return total, out, codes, scale


def rms_norm(run: Runner, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False) -> Tensor:
    """See `graphwright.ops.rms_norm`."""
    _, out, _, _ = _launch(
        run, x, None, weight, None, eps, centred=False, unit_offset=unit_offset, quantize=False
    )  # fmt: skip
    return _present(out)


def add_rms_norm(
    run: Runner, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum x + residual in their dtype, and its norm."""
    total, out, _, _ = _launch(
        run, x, residual, weight, None, eps, centred=False, unit_offset=unit_offset, quantize=False
    )
    return _present(total), _present(out)


def rms_norm_quantize(
    run: Runner, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm as int8 codes [..., K] and float32 scales [..., 1], one per row."""
    _, _, codes, scale = _launch(
        run, x, None, weight, None, eps, centred=False, unit_offset=unit_offset, quantize=True
    )  # fmt: skip
    return _present(codes), _present(scale)


def add_rms_norm_quantize(
    run: Runner, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + residual in their dtype, and its norm as int8 codes [..., K] and float32 scales [..., 1]."""
    total, _, codes, scale = _launch(
        run, x, residual, weight, None, eps, centred=False, unit_offset=unit_offset, quantize=True
    )
    return _present(total), _present(codes), _present(scale)


def layer_norm(run: Runner, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension."""
    _, out, _, _ = _launch(run, x, None, weight, bias, eps, centred=True, unit_offset=False, quantize=False)
    return _present(out)


def add_layer_norm(
    run: Runner, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum x + residual in their dtype, and its norm."""
    total, out, _, _ = _launch(run, x, residual, weight, bias, eps, centred=True, unit_offset=False, quantize=False)
    return _present(total), _present(out)


def _present(x: Tensor | None) -> Tensor:
    assert x is not None  # noqa: S101 - the launch above asked for it
    return x


def rms_norm_quantize_reference(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes and scales whose product is `quantize_dequantize(rms_norm(x))`."""
    normed = rms_norm_op.reference(x, weight, eps, unit_offset)
    scale = (normed.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (normed.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "rms_norm 4096": lambda run, dtype: rms_norm(run, meta(dtype, 512, 4096), meta(dtype, 4096), 1e-6),
    "rms_norm 576": lambda run, dtype: rms_norm(run, meta(dtype, 512, 576), meta(dtype, 576), 1e-6),
    "add_rms_norm 4096": lambda run, dtype: add_rms_norm(
        run, meta(dtype, 512, 4096), meta(dtype, 512, 4096), meta(dtype, 4096), 1e-6
    ),
    "rms_norm_quantize 4096": lambda run, dtype: rms_norm_quantize(
        run, meta(dtype, 512, 4096), meta(dtype, 4096), 1e-6
    ),
    "add_rms_norm_quantize 4096": lambda run, dtype: add_rms_norm_quantize(
        run, meta(dtype, 512, 4096), meta(dtype, 512, 4096), meta(dtype, 4096), 1e-6
    ),
    "layer_norm 4096": lambda run, dtype: layer_norm(
        run, meta(dtype, 512, 4096), meta(dtype, 4096), meta(dtype, 4096), 1e-5
    ),
}
