"""Rows of a table of low-bit codes, decoded as they are read; layout in `graphwright.packing`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright import packing
from graphwright.errors import BackendError
from graphwright.kernels.triton.launch import Config, Launch, Runner, Work, cdiv, check_device, meta
from graphwright.kernels.triton.quantized_gemm import PARTS, decode, load_high, table_of


@triton.jit
def look_up(
    index_ptr, weight_ptr, scale_ptr, zero_ptr, table_ptr, out_ptr, width, groups,
    PARTS: tl.constexpr, HIGH: tl.constexpr, GROUP_SIZE: tl.constexpr, SYMMETRIC_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Part of one row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    run: tl.constexpr = GROUP_SIZE // PARTS
    stride: tl.constexpr = run + run // 2 if HIGH else run
    row = tl.load(index_ptr + token).to(tl.int64)
    group, within = column // GROUP_SIZE, column % GROUP_SIZE
    group_at = weight_ptr + row * groups * stride + group * stride
    byte = tl.load(group_at + within % run, mask=inside, other=0)
    high = None
    if HIGH:
        high = load_high(group_at + run, within % run, inside, run)
    scale = tl.load(scale_ptr + row * groups + group, mask=inside, other=0.0).to(tl.float32)
    zero = SYMMETRIC_ZERO
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + row * groups + group, mask=inside, other=0.0).to(tl.float32)
    result = decode(byte, high, within // run, table_ptr, scale, -zero * scale, PARTS)
    tl.store(out_ptr + token * width + column, result.to(out_ptr.dtype.element_ty), mask=inside)


def quantized_embedding(
    run: Runner,
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `graphwright.ops.quantized_embedding`.

    Raises:
        BackendError: a format without a kernel.
    """
    if format not in PARTS:
        raise BackendError(f"No kernel looks up {format} rows", fix=f"There are kernels for {', '.join(PARTS)}")
    check_device(indices=indices, weight=weight, scale=scale, zero_point=zero_point)
    tokens = indices.numel()
    out = torch.empty(*indices.shape, embedding_dim, dtype=dtype, device=weight.device)
    run(
        Launch(
            look_up,
            {"index_ptr": indices.contiguous(), "weight_ptr": weight, "scale_ptr": scale, "zero_ptr": zero_point,
             "table_ptr": table_of(format, weight.device), "out_ptr": out, "width": embedding_dim,
             "groups": scale.shape[1]},
            {"PARTS": PARTS[format], "HIGH": format == "int3", "GROUP_SIZE": group_size,
             "SYMMETRIC_ZERO": float(packing.FORMATS[format].zero)},
            (Config.of(4, BLOCK=1024), Config.of(4, BLOCK=512), Config.of(2, BLOCK=256)),
            lambda c: (tokens, cdiv(embedding_dim, c["BLOCK"])),
            lambda c: Work(4 * c["BLOCK"], c["BLOCK"] * (dtype.itemsize + packing.FORMATS[format].bits / 8)),
            static=frozenset(("width", "groups")),
        )
    )  # fmt: skip
    return out


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "int8 per row": lambda run, dtype: quantized_embedding(
        run, meta(torch.int64, 1, 512), meta(torch.int8, 49152, 576), meta(torch.float32, 49152, 1), None, "int8",
        576, 576, dtype,
    ),
    "int4 group 128": lambda run, dtype: quantized_embedding(
        run, meta(torch.int64, 1, 512), meta(torch.uint8, 128256, 2048), meta(torch.float16, 128256, 32),
        meta(torch.float16, 128256, 32), "int4", 128, 4096, dtype,
    ),
}  # fmt: skip
