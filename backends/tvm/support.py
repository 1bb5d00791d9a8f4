"""Which nodes become kernels of this backend, and what stands in the way of the others."""

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.backend import Support
from graphwright.backends.tvm import expert_layout
from graphwright.backends.tvm.fusion import cached_parts, from_half, multiplies_codes
from graphwright.backends.tvm.layout import fractional, halves_obstacle, stored_float
from graphwright.backends.tvm.leftovers import converter_name, refusal
from graphwright.backends.tvm.translate import KERNELS, VIEWS, constant_place
from graphwright.kernels.tir.tiles import fits
from graphwright.match import arguments
from graphwright.op import op_of
from graphwright.text import op_name

aten = torch.ops.aten


def support(node: fx.Node) -> Support:
    """Whether a node becomes a kernel; the program's weights may still be in the core's layout."""
    reason = _obstacle(node)
    return Support(not reason, reason)


def _obstacle(node: fx.Node) -> str:
    value = node.meta.get("val")
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and node.target is not ops.kv_cache_update.target:
        return f"{converter_name(node)} writes into its argument"
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32 and not _held(node):
        return "the TVM backend computes in float32"
    if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
        return _quantized_obstacle(node)
    if node.target in (ops.experts.target, ops.quantized_experts.target):
        return expert_layout.obstacle(node)
    if node.target is ops.sparse_linear.target:
        return halves_obstacle(node)
    if node.target is aten.linear.default:
        return "" if stored_float(node, 1) else "its weight is not a stored float32 matrix"
    if node.target is ops.attention.target:
        return "the attention kernels take no bias" if arguments(node)["bias"] is not None else ""
    if node.target is ops.quantize_dequantize.target:
        return "" if _only_codes(node) else "only 8-bit codes per token, or per part of a weight's group, have kernels"
    if node.target is ops.quantize_tokens.target:
        return _rounding_obstacle(node)
    if node.target is ops.dequantize_tokens.target:
        return _format_obstacle(str(node.args[2]))
    if node.target is aten.layer_norm.default:
        return "" if len(arguments(node)["normalized_shape"]) == 1 else "it normalises more than the last dimension"
    if node.target is aten.index.Tensor:
        return "" if constant_place(node) else refusal(node)
    if node.target in KERNELS or node.target in VIEWS or isinstance(value, torch.SymInt):
        return ""
    if op_of(node.target) is not None:
        return f"the TVM backend has no kernel for {op_name(node.target)}"
    return refusal(node)


def _held(node: fx.Node) -> bool:
    """Whether a node is part of a float16 cache that is only read to be converted to float32."""
    return (
        node.target is aten.slice.Tensor
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "placeholder"
        and all(map(from_half, node.users))
    )


def _quantized_obstacle(node: fx.Node) -> str:
    format, group_size = node.args[5:7] if node.target is ops.quantized_linear.target else node.args[4:6]
    if not fits(str(format), int(group_size)):
        return f"no tiles for {format} in groups of {group_size}"
    if fractional(node):
        return "its zero points are fractions, and tiles hold whole ones"
    return ""


def _rounding_obstacle(node: fx.Node) -> str:
    if cached_parts(node) is None:
        return "what it rounds is not written to a cache of codes and a cache of scales"
    return _format_obstacle(str(node.args[1]))


def _format_obstacle(format: str) -> str:
    return "" if format == "int8" else f"caches in {format} have no kernel, only int8"


def _only_codes(node: fx.Node) -> bool:
    """Whether every reader of a rounding is a quantized linear layer whose kernel takes its codes."""
    return all(multiplies_codes(node, user) for user in node.users)
