"""Compiles one kernel for this machine and calls it with torch tensors."""

import torch
import tvm
from tvm import tirx

from graphwright.backends.tvm.machine import tvm_target
from graphwright.kernels.tir.emit import Layout
from graphwright.target import Target

HOST = Target.parse("cpu")


def run(function: tirx.PrimFunc, *tensors: torch.Tensor) -> None:
    """Calls the kernel; outputs are among the arguments."""
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    tvm.compile(module, target=tvm_target(HOST))["kernel"](*tensors)


def size(name: str) -> tirx.Var:
    """A symbolic size."""
    return tirx.Var(name, "int64")


def nowhere(*shape: int) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, float("nan"))


def dense(*shape: object) -> Layout:
    """A contiguous layout."""
    return Layout.contiguous(shape)
