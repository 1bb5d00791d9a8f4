"""From semantic ops to ops with kernels, fusing neighbours that one kernel serves; what has no kernel stays."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright import ops as semantic
from graphwright import packing
from graphwright.backend import Support
from graphwright.backends.triton import caches, kivi, ops
from graphwright.backends.triton.experts import experts_as_products
from graphwright.kernels.triton import integer_gemm, norm, quantize, quantized_gemm, sparse_gemm
from graphwright.kernels.triton.device import Device
from graphwright.op import op_of
from graphwright.ops.gated_activation import ACTIVATIONS
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.sparsity import TENSOR_CORES
from graphwright.text import op_name

aten = torch.ops.aten

KERNELS: dict[Any, ops.TritonOp] = {
    semantic.rms_norm.target: ops.rms_norm,
    semantic.gated_activation.target: ops.gated_activation,
    semantic.rope.target: ops.rotate,
    semantic.kv_cache_update.target: ops.kv_cache_update,
    semantic.attention.target: ops.attention,
    semantic.quantized_linear.target: ops.quantized_linear,
    semantic.grouped_linear.target: ops.grouped_linear,
    semantic.sparse_linear.target: ops.sparse_linear,
    semantic.quantized_embedding.target: ops.quantized_embedding,
    aten.layer_norm.default: ops.layer_norm,
}
"""What a call becomes when nothing beside it is fused with it."""

CACHES = tuple(
    op.target
    for op in (
        semantic.quantize_tokens, semantic.dequantize_tokens, semantic.paged_update, semantic.paged_read,
    )
)  # fmt: skip
"""Ops of cache layouts, which `caches` serves or refuses; `kivi` does those of its own."""

ANY_DTYPE = (semantic.kv_cache_update.target, semantic.quantized_embedding.target)
"""Ops whose first argument may be of a dtype that is not computed in."""

FP8 = "fp8_e4m3"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def lower(program: Program, device: Device | None = None) -> Program:
    """A copy of `program` whose calls are ops with kernels wherever there is one.

    Without a device, those that every device has.
    """
    lowered = program.clone()
    with Editor(lowered, "triton") as editor:
        _integer_products(lowered, editor, device)
        lowered.graph.eliminate_dead_code()
        for step in STEPS:
            step(lowered, editor)
            lowered.graph.eliminate_dead_code()
    return lowered


def support(node: fx.Node, device: Device | None = None) -> Support:
    """Whether a call has a kernel on a device, and if not, why."""
    if node.target in ops.OPS:
        return Support(True)
    if node.target == semantic.experts.target:
        ok = _value(node).dtype in FLOATS
        return Support(ok, "" if ok else f"no kernel computes in {_value(node).dtype}")
    if node.target == semantic.quantize_dequantize.target:
        if any(_multiplied_as_integers(node, user, device) for user in node.users):
            return Support(True)
        return Support(False, _rounding_refusal(node, device))
    if any(_multiplied_as_integers(rounding, node, device) for rounding in node.all_input_nodes):
        return Support(True)
    if node.target in KERNELS:
        reason = _refusal(node)
        return Support(not reason, reason)
    if node.target in CACHES or node.target in kivi.OPS:
        reason = kivi.refusal(node) if node.target in kivi.OPS else caches.refusal(node)
        return Support(not reason, reason)
    if node.target is operator.getitem or any(_summed_in_norm(node, user) for user in node.users):
        return Support(True)
    if isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or "sym_" in node.target._opname):
        return Support(True)
    if op_of(node.target) is not None:
        return Support(False, f"{op_name(node.target)} has no Triton kernel; its reference runs as PyTorch ops")
    return Support(False, f"{op_name(node.target)} is left to PyTorch, or to Inductor under torch.compile")


def _refusal(node: fx.Node) -> str:
    """Why the kernel that serves a call's op does not serve this call; empty if it does."""
    args = _arguments(node)
    value = _value(args[0])
    if value.dtype not in FLOATS and node.target not in ANY_DTYPE:
        return f"no kernel computes in {value.dtype}"
    checks: dict[Any, Callable[[], str]] = {
        semantic.rms_norm.target: lambda: _row_refusal(value.shape[-1]),
        aten.layer_norm.default: lambda: _layer_norm_refusal(args),
        semantic.gated_activation.target: lambda: (
            "" if args[2] in ACTIVATIONS else f"no kernel has the activation {args[2]}"
        ),
        semantic.attention.target: lambda: caches.head_refusal(node),
        semantic.quantized_linear.target: lambda: _weight_refusal(args[5], args[6]),
        semantic.sparse_linear.target: lambda: _sparse_refusal(args[6], args[7], args[8], value, _value(args[1])),
        semantic.quantized_embedding.target: lambda: (
            "" if args[4] in quantized_gemm.PARTS else f"{args[4]} tables have no kernel"
        ),
    }
    return checks.get(node.target, lambda: "")()


def _row_refusal(width: Any) -> str:
    if not isinstance(width, int):
        return "rows of varying width have no kernel"
    return "" if width <= norm.LARGEST_ROW else f"rows of {width} have no kernel; the widest takes {norm.LARGEST_ROW}"


def _layer_norm_refusal(args: list[Any]) -> str:
    if len(args[1]) != 1:
        return "there is a kernel for layer_norm over one dimension only"
    return _row_refusal(_value(args[0]).shape[-1])


def _weight_refusal(format: str, group_size: int) -> str:
    smallest, largest = quantized_gemm.GROUP_SIZES
    if format not in quantized_gemm.PARTS:
        return f"{format} weights have no kernel; there are kernels for {', '.join(quantized_gemm.PARTS)}"
    fits = smallest <= group_size <= largest and group_size % packing.FORMATS[format].unit == 0
    return "" if fits else f"groups of {group_size} have no kernel; there are kernels for {smallest} to {largest}"


def _sparse_refusal(layout: str, format: str, group_size: int, x: torch.Tensor, values: torch.Tensor) -> str:
    if layout == TENSOR_CORES:
        return "torch's CUTLASS kernel multiplies weights in the layout of sparse tensor cores"
    if layout != "2:4":
        return f"sparse weights of layout {layout} have no kernel; there is one for 2:4"
    if not sparse_gemm.serves(format, group_size):
        return f"2:4 weights in {format}, groups of {group_size}, have no kernel; floating point, int8 and int4 have"
    if format:
        return ""
    return "" if x.dtype == values.dtype else f"2:4 values in {values.dtype} do not fit activations in {x.dtype}"


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments in the order of the schema, defaults filled in."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(a.name, a.default_value) for a in schema]


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _rounding_refusal(node: fx.Node, device: Device | None) -> str:
    format = _arguments(node)[2]
    if format == FP8 and device is not None and not device.fp8:
        other = "; it has another 8-bit type, e4m3fnuz" if device.name == "rocm:gfx942" else ""
        return f"{device.name} multiplies no e4m3{other}. PyTorch rounds the activations"
    if format not in quantize.ROUNDED:
        return f"no kernel multiplies activations in {format}; PyTorch rounds them"
    return "no product of codes reads these; PyTorch rounds the activations"


def _multiplied_as_integers(rounding: fx.Node, user: fx.Node, device: Device | None) -> bool:
    """Whether a kernel multiplies the codes of a rounding with the weights of a layer that reads it."""
    if rounding.target != semantic.quantize_dequantize.target or user.target != semantic.quantized_linear.target:
        return False
    _, scale, format, group_size = _arguments(rounding)
    if format not in quantize.ROUNDED or _value(rounding).dtype not in FLOATS:
        return False
    if format == FP8 and not (device is not None and device.fp8):
        return False
    x, _, _, zero, _, weight_format, weight_group = _arguments(user)
    del scale
    if x is not rounding or group_size or (format == FP8) != (weight_format == FP8):
        return False
    if zero is not None and _value(zero).dtype == torch.float16:  # a fraction of a code
        return False
    return integer_gemm.serves(weight_format, weight_group, zero is not None)


def _integer_products(program: Program, editor: Editor, device: Device | None) -> None:
    """Rounding in front of products becomes codes, made by the kernel before it where there is one."""
    for rounding in program.calls(semantic.quantize_dequantize.target):
        users = [user for user in rounding.users if _multiplied_as_integers(rounding, user, device)]
        if not users:
            continue
        x, scale, format, group_size = _arguments(rounding)
        fused = format == "int8" and scale is None and len(x.users) == 1
        made = _made_as_codes(editor, rounding, x) if fused else None
        if made is None:
            made = editor.call(ops.quantize_activations.target, x, scale, format, group_size, before=rounding)
        codes, step = (_item(editor, made, index, rounding) for index in (0, 1))
        for user in users:
            _, weight, weight_scale, zero, bias, weight_format, weight_group = _arguments(user)
            arguments = (codes, step, weight, weight_scale, zero, bias, weight_format, weight_group)
            new = editor.call(ops.integer_linear.target, *arguments, _value(user).dtype, before=user)
            editor.replace(user, new)


def _made_as_codes(editor: Editor, rounding: fx.Node, x: fx.Node) -> fx.Node | None:
    """The producer of `x` with its result as codes, if there is a kernel for that."""
    fused = {
        semantic.rms_norm.target: ops.rms_norm_quantize,
        semantic.gated_activation.target: ops.gated_activation_quantize,
    }
    if x.target not in fused or _refusal(x) or _row_refusal(_value(x).shape[-1]):
        return None
    return editor.call(fused[x.target].target, *_arguments(x), before=rounding)


def _item(editor: Editor, node: fx.Node, index: int, before: fx.Node) -> fx.Node:
    return editor.call(operator.getitem, node, index, before=before)


def _norm_after_sum(program: Program, editor: Editor) -> None:
    """A residual sum and the norm of it, as numbers or as codes, become one pass over memory."""
    for node in program.calls(semantic.rms_norm.target, ops.rms_norm_quantize.target):
        total, weight, eps, unit_offset = _arguments(node)
        coded = node.target == ops.rms_norm_quantize.target
        if not (_plain_sum(total) if coded else _summed_in_norm(total, node)):
            continue
        first = next(n for n in program.graph.nodes if n in total.users)
        x, residual = total.args[:2]
        if not _before(program, weight, first):
            continue
        fused = ops.add_rms_norm_quantize if coded else ops.add_rms_norm
        both = editor.call(fused.target, x, residual, weight, eps, unit_offset, before=first)
        if coded:
            for part in list(node.users):
                editor.replace(part, _item(editor, both, part.args[1] + 1, first))
        else:
            editor.replace(node, _item(editor, both, 1, first))
        editor.replace(total, _item(editor, both, 0, first))


def _summed_in_norm(total: fx.Node, norm: fx.Node) -> bool:
    """Whether `total` is a sum that the kernel of the norm of it computes as well."""
    return (
        norm.target == semantic.rms_norm.target and norm.args[0] is total and _plain_sum(total) and not _refusal(norm)
    )


def _plain_sum(node: fx.Node) -> bool:
    """The sum of two tensors of one shape and dtype."""
    if node.target != aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor) for a in node.args):
        return False
    values = [_value(a) for a in node.args]
    return all(v.shape == _value(node).shape and v.dtype == _value(node).dtype for v in values)


def _before(program: Program, node: Any, place: fx.Node) -> bool:
    """Moves a weight's read in front of `place` if need be; whether `node` is known there."""
    if node is None or node < place:
        return True
    if node.op == "get_attr":
        place.prepend(node)
        return True
    return False


def _rope_into_cache(program: Program, editor: Editor) -> None:
    """Rotated keys that go nowhere but into a cache are written there at once."""
    for node in program.calls(semantic.kv_cache_update.target):
        cache, new, slots = _arguments(node)
        if new.target != semantic.rope.target or len(new.users) != 1 or _refusal(new):
            continue
        x, positions, inv_freq, scaling, interleaved = _arguments(new)
        arguments = (cache, x, slots, positions, inv_freq, scaling, interleaved)
        editor.call(ops.rope_cache_update.target, *arguments, before=node)
        editor.note(node, "")
        program.graph.erase_node(node)


def _each_by_itself(program: Program, editor: Editor) -> None:
    for node in program.calls(*KERNELS):
        if _refusal(node):
            continue
        arguments = _arguments(node)
        if node.target == aten.layer_norm.default:
            x, _shape, weight, bias, eps, *_ = arguments
            arguments = [x, weight, bias, eps]
        if node.target == semantic.sparse_linear.target:
            arguments = [*arguments[:6], *arguments[7:9]]
        new = editor.call(KERNELS[node.target].target, *arguments, before=node)
        if node.target == semantic.kv_cache_update.target:
            program.graph.erase_node(node)
        else:
            editor.replace(node, new)


STEPS = (
    experts_as_products, _norm_after_sum, kivi.in_place, caches.read_in_place, caches.merge_writes,
    _rope_into_cache, _each_by_itself,
)  # fmt: skip
"""In order, after products of codes: what is fused goes first."""
