"""Compiles one kernel for this machine and calls it with torch tensors."""

from collections.abc import Callable

import torch
import tvm
import tvm_ffi
from torch.nn import functional
from tvm import tirx

from graphwright.backends.tvm.build import build_kernels
from graphwright.kernels.tir.emit import Layout
from graphwright.kernels.tir.linear import Linear
from graphwright.kernels.tir.quantize import CodeRow
from graphwright.target import Target

HOST = Target.parse("cpu")


_compiled: dict[int, list[tuple[tirx.PrimFunc, Callable[..., None]]]] = {}
"""Kernels by the hash of their code: many sizes are tested with one kernel, and compiling takes seconds."""


def compiled(function: tirx.PrimFunc) -> Callable[..., None]:
    """The kernel for this machine; equal ones are compiled once."""
    known = _compiled.setdefault(tvm_ffi.structural_hash(function), [])
    for other, kernel in known:
        if tvm_ffi.structural_equal(function, other):
            return kernel
    known.append((function, _compile(function)))
    return known[-1][1]


def _compile(function: tirx.PrimFunc) -> Callable[..., None]:
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    return build_kernels(module, HOST)["kernel"]


def run(function: tirx.PrimFunc, *tensors: torch.Tensor) -> None:
    """Compiles the kernel and calls it; outputs are among the arguments."""
    compiled(function)(*tensors)


def one_by_one(function: tirx.PrimFunc, layer: Linear, tensors: list[torch.Tensor], rows: int) -> torch.Tensor:
    """What a linear kernel for one row makes of each row of its first tensor, and of the residual, its last one."""
    call, made = compiled(function), []
    for row in range(rows):
        own = [tensors[0][:, row : row + 1].contiguous(), *tensors[1:]]
        if layer.residual:
            own[-1] = own[-1][:, row : row + 1].contiguous()
        made.append(nowhere(1, 1, layer.width))
        call(*own, made[-1])
    return torch.cat(made, 1)


def size(name: str) -> tirx.Var:
    """A symbolic size."""
    return tirx.Var(name, "int64")


def nowhere(*shape: int) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, float("nan"))


def dense(*shape: object) -> Layout:
    """A contiguous layout."""
    return Layout.contiguous(shape)


def code_rows(x: torch.Tensor, row: CodeRow) -> torch.Tensor:
    """Activations [..., K] as rows of codes, made with torch."""
    parts = x.unflatten(-1, (row.steps, -1))
    step = (parts.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = functional.pad((parts / step).round().flatten(-2).to(torch.int8), (0, row.padded - row.width))
    sums = codes.unflatten(-1, (row.groups, row.group_size)).sum(-1, dtype=torch.int32)
    step = step.flatten(-2)
    parts = [functional.pad(codes, (0, row.sums * 4 - row.padded)), sums.view(torch.int8), step.view(torch.int8)]
    return functional.pad(torch.cat(parts, -1), (0, row.bytes - (row.step + row.steps) * 4))


def split_rows(rows: torch.Tensor, row: CodeRow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, sums and steps of rows of codes."""
    sums = rows[..., row.sums * 4 : row.step * 4].contiguous().view(torch.int32)
    step = rows[..., row.step * 4 : (row.step + row.steps) * 4].contiguous().view(torch.float32)
    return rows[..., : row.padded], sums, step
