"""Which nodes become kernels of this backend, and what stands in the way of the others."""

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.backend import Support
from graphwright.backends.tvm.fusion import integer_product
from graphwright.backends.tvm.layout import fits, fractional, tiled_linear
from graphwright.backends.tvm.leftovers import converter_name, known
from graphwright.backends.tvm.translate import KERNELS, VIEWS
from graphwright.op import op_of


def support(node: fx.Node) -> Support:
    """Whether a node becomes a kernel; quantized layers may still be in the core's layout."""
    value = node.meta.get("val")
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and node.target is not ops.kv_cache_update.target:
        return Support(False, f"{converter_name(node)} writes into its argument")
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return Support(False, "the TVM backend computes in float32")
    if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
        linear = node.target is ops.quantized_linear.target
        format, group_size = node.args[5:7] if linear else node.args[4:6]
        if not fits(str(format), int(group_size)):
            return Support(False, f"no tiles for {format} in groups of {group_size}")
        if fractional(node):
            return Support(False, "its zero points are fractions, and tiles hold whole ones")
        if linear and not _rounded(node):
            return Support(False, "its activations are not quantized per token; add the pass `activations`")
        return Support(True)
    if node.target is tiled_linear.target:
        return Support(integer_product(node), "" if integer_product(node) else "its activations are not quantized")
    if node.target is torch.ops.aten.linear.default:
        return Support(False, "floating-point linear layers have no kernel")
    if node.target is ops.attention.target and len(node.args) > 5 and node.args[5] is not None:
        return Support(False, "the attention kernels take no bias")
    if node.target is ops.quantize_dequantize.target:
        codes_only = all(_rounded(user) for user in node.users)
        return Support(codes_only, "" if codes_only else "its values are read by more than quantized linear layers")
    if node.target in KERNELS or node.target in VIEWS:
        return Support(True)
    if op_of(node.target) is not None or converter_name(node) not in known():
        return Support(isinstance(value, torch.SymInt), f"TVM has no converter for {converter_name(node)}")
    return Support(True)


def _rounded(node: fx.Node) -> bool:
    """Whether a node is a quantized linear layer over activations that are rounded to 8 bits per token."""
    source = node.args[0]
    return (
        node.target in (ops.quantized_linear.target, tiled_linear.target)
        and isinstance(source, fx.Node)
        and source.target is ops.quantize_dequantize.target
        and source.args[1:] == (None, "int8", 0)
    )
