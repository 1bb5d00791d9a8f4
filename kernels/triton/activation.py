"""activation(gate) * up, the middle of a gated MLP, with the rounding to int8 after it in the same pass.

Shazeer 2020, arXiv:2002.05202. Gate and up may be halves of one merged matrix product: rows need not be adjacent.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError, nearest
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
from graphwright.kernels.triton.norm import LARGEST_ROW
from graphwright.kernels.triton.rounding import quantize_rows, tanh
from graphwright.ops import gated_activation as gated_activation_op
from graphwright.ops.gated_activation import ACTIVATIONS


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The named activation of float32 `x`."""
    if ACTIVATION == "silu":
        result = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        result = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        result = tl.maximum(x, 0.0)
    return result


@triton.jit
def gate(
    gate_ptr, up_ptr, out_ptr, rows, gate_row, up_row,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of the result."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    here = row[:, None].to(tl.int64)
    x = tl.load(gate_ptr + here * gate_row + column[None, :], mask=inside, other=0.0)
    up = tl.load(up_ptr + here * up_row + column[None, :], mask=inside, other=0.0)
    active = activate(x.to(tl.float32), ACTIVATION).to(x.dtype).to(tl.float32)
    result = (active * up.to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + here * WIDTH + column[None, :], result, mask=inside)


@triton.jit
def gate_and_quantize(
    gate_ptr, up_ptr, codes_ptr, scale_ptr, rows, gate_row, up_row,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Whole rows, because their scale is needed before any code."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    here = row[:, None].to(tl.int64)
    x = tl.load(gate_ptr + here * gate_row + column[None, :], mask=inside, other=0.0)
    up = tl.load(up_ptr + here * up_row + column[None, :], mask=inside, other=0.0)
    active = activate(x.to(tl.float32), ACTIVATION).to(x.dtype).to(tl.float32)
    result = (active * up.to(tl.float32)).to(x.dtype)
    codes, scale = quantize_rows(result.to(tl.float32), LARGEST)
    tl.store(codes_ptr + here * WIDTH + column[None, :], codes.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


TILES = tuple(
    Config.of(num_warps=warps, BLOCK_ROWS=rows, BLOCK_WIDTH=width)
    for rows, width, warps in ((1, 1024, 4), (1, 2048, 4), (4, 1024, 4), (4, 1024, 8))
)


def _rows(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation not in ACTIVATIONS:
        raise BackendError(f"No kernel has the activation {activation!r}", fix=nearest(activation, ACTIVATIONS))
    if gate.shape != up.shape:
        raise BackendError(f"gate has shape {tuple(gate.shape)} and up has shape {tuple(up.shape)}; they must agree")
    check_device(gate=gate, up=up)
    return rows_of(gate), rows_of(up)


def gated_activation(run: Runner, gate_input: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `graphwright.ops.gated_activation`."""
    x, other = _rows(gate_input, up, activation)
    rows, width = x.shape
    out = torch.empty(gate_input.shape, dtype=gate_input.dtype, device=gate_input.device)
    run(
        Launch(
            gate,
            {"gate_ptr": x, "up_ptr": other, "out_ptr": out, "rows": rows, "gate_row": x.stride(0),
             "up_row": other.stride(0)},
            {"WIDTH": width, "ACTIVATION": activation},
            TILES,
            lambda c: (cdiv(rows, c["BLOCK_ROWS"]), cdiv(width, c["BLOCK_WIDTH"])),
            lambda c: _work(c["BLOCK_ROWS"] * c["BLOCK_WIDTH"], 3 * x.element_size()),
            static=fixed(width, "gate_row", "up_row"),
        )
    )  # fmt: skip
    return out


def gated_activation_quantize(
    run: Runner, gate_input: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The product as int8 codes [..., K] and float32 scales [..., 1], one per row."""
    x, other = _rows(gate_input, up, activation)
    rows, width = x.shape
    if width > LARGEST_ROW:
        raise BackendError(f"Rows of {width} are rounded by no kernel", fix=f"The widest there is takes {LARGEST_ROW}")
    codes = torch.empty(gate_input.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*gate_input.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    choices = tuple(
        Config.of(num_warps=warps, BLOCK_ROWS=max(1, 1024 // block), BLOCK_WIDTH=block)
        for warps in ((4,) if block <= 1024 else (4, 8, 16))
    )
    run(
        Launch(
            gate_and_quantize,
            {"gate_ptr": x, "up_ptr": other, "codes_ptr": codes, "scale_ptr": scale, "rows": rows,
             "gate_row": x.stride(0), "up_row": other.stride(0)},
            {"WIDTH": width, "ACTIVATION": activation, "LARGEST": 127},
            choices,
            lambda c: (cdiv(rows, c["BLOCK_ROWS"]),),
            lambda c: _work(c["BLOCK_ROWS"] * width, 2 * x.element_size() + 1),
            static=fixed(width, "gate_row", "up_row"),
        )
    )  # fmt: skip
    return codes, scale


def _work(elements: int, bytes_each: int) -> Work:
    return Work(10 * elements, elements * bytes_each)


def gated_activation_quantize_reference(
    gate_input: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scales whose product is `quantize_dequantize(gated_activation(gate, up))`."""
    result = gated_activation_op.reference(gate_input, up, activation).float()
    scale = (result.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (result / scale).round().clamp(-127, 127).to(torch.int8), scale


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "silu 14336": lambda run, dtype: gated_activation(run, meta(dtype, 512, 14336), meta(dtype, 512, 14336), "silu"),
    "gelu_tanh 14336": lambda run, dtype: gated_activation(
        run, meta(dtype, 512, 14336), meta(dtype, 512, 14336), "gelu_tanh"
    ),
    "silu quantize 14336": lambda run, dtype: gated_activation_quantize(
        run, meta(dtype, 512, 14336), meta(dtype, 512, 14336), "silu"
    ),
}
