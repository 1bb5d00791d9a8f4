"""Which nodes Inductor generates code for, and which it hands to a kernel that exists already."""

import functools
from typing import Any

import torch
from torch import fx

from graphwright.backend import Support
from graphwright.op import op_of
from graphwright.ops import quantized_linear, spqr_linear

FAST_FORMATS = ("int4", "int8", "int4_offset")
"""Weight formats whose codes are multiplied as they are read."""

EXTERN = {
    "mm", "bmm", "addmm", "baddbmm", "matmul", "convolution", "conv1d", "conv2d", "_grouped_mm", "_scaled_mm",
}  # fmt: skip
"""Products that Inductor leaves to the vendor's library on the CPU."""

ATTENTION = {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"}


def support(node: fx.Node) -> Support:
    """Whether a call becomes Inductor's own code on the CPU."""
    target = node.target
    if target is quantized_linear.target and node.args[5] not in FAST_FORMATS:
        return Support(False, f"{node.args[5]} weights are dequantized in memory at every call; no fused product")
    if target is spqr_linear.target:
        return Support(
            False, f"{node.args[9]} weights of SpQR are dequantized in memory at every call; no fused product"
        )
    if op_of(target) is not None or not isinstance(target, torch._ops.OpOverload):
        return Support(True)
    name = target._opname
    if target.namespace not in ("aten", "prims", "prim"):
        return Support(False, f"{target.namespace}::{name} is a custom op; Inductor calls its kernel")
    if name in EXTERN:
        return Support(False, f"{name} calls the vendor's matrix product")
    if name in ATTENTION:
        return Support(False, f"{name} calls PyTorch's flash attention")
    if _falls_back(target):
        return Support(False, f"Inductor has no lowering of {name}; it calls PyTorch's kernel")
    return Support(True)


@functools.cache
def _falls_back(target: Any) -> bool:
    from torch._inductor import decomposition, lowering

    if target in lowering.fallbacks or target.overloadpacket in lowering.fallbacks:
        return True
    known = target in lowering.lowerings or target in decomposition.decompositions
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return not (known or target.has_kernel_for_dispatch_key(composite) or _is_view_or_size(target))


def _is_view_or_size(target: Any) -> bool:
    return target.is_view or target._opname.startswith("sym_") or target._schema.is_mutable
