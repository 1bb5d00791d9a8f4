"""Which nodes of a program become one kernel: chains whose inner values nobody else reads.

norm → rounding                        one kernel that puts out codes
rope → cache update                    keys are rotated on their way into the cache
rounding → updates of codes and scale  one kernel that rounds what it writes, rotated where it is a key
dequantized cache → attention          codes become floats as they are read
float16 cache → float32 → attention    the same
linear → add of a tensor of its shape  the residual is added as the linear layer stores
linear → halves → gated activation     gate and up are multiplied as the linear layer stores
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright import ops
from graphwright.backends.tvm.layout import (
    halves_obstacle,
    tiled_float_linear,
    tiled_linear,
    tiled_sparse_linear,
)
from graphwright.kernels.tir.functions import ACTIVATIONS
from graphwright.kernels.tir.tiles import CHUNK, ROWS, STEP, fits
from graphwright.program import Program

aten = torch.ops.aten

NORMS = (ops.rms_norm.target, aten.layer_norm.default)


@dataclass
class Fusion:
    """What is computed where.

    Attributes:
        inside: nodes that a later kernel computes.
        linear: the linear layer that a node finishes, by that node.
        norm: the norm that a rounding takes its values from.
        rope: the rotation of what a cache update writes.
        codes: the rounding, and the update of its scales, by the update of its codes.
        held: dequantized caches that only attentions read.
        widened: conversions from float16 to float32 that only attentions read.
    """

    inside: set[fx.Node] = field(default_factory=set)
    linear: dict[fx.Node, fx.Node] = field(default_factory=dict)
    norm: dict[fx.Node, fx.Node] = field(default_factory=dict)
    rope: dict[fx.Node, fx.Node] = field(default_factory=dict)
    codes: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    held: set[fx.Node] = field(default_factory=set)
    widened: set[fx.Node] = field(default_factory=set)


def integer_product(node: Any) -> bool:
    """Whether a node multiplies codes with codes: a tiled weight, and activations rounded to 8 bits at run time."""
    if not isinstance(node, fx.Node) or node.target not in (tiled_linear.target, tiled_sparse_linear.target):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target is not ops.quantize_dequantize.target:
        return False
    return multiplies_codes(source, node)


def multiplies_codes(rounding: fx.Node, layer: fx.Node) -> bool:
    """Whether a kernel takes a rounding's codes to a layer: steps per token, or per part of the weight's groups."""
    shared, width = int(rounding.args[3]), int(rounding.meta["val"].shape[-1])
    if rounding.args[1:3] != (None, "int8"):
        return False
    if layer.target in (ops.quantized_linear.target, tiled_linear.target):
        format, group_size = str(layer.args[5]), int(layer.args[6])
        span = STEP.get(format, 0)
        fit = fits(format, group_size)
    elif layer.target in (ops.sparse_linear.target, tiled_sparse_linear.target):
        tiled = layer.target is tiled_sparse_linear.target
        format, group_size = str(layer.args[5 if tiled else 7]), int(layer.args[6 if tiled else 8])
        span = CHUNK
        fit = bool(format) and (tiled or not halves_obstacle(layer))
    else:
        return False
    return fit and (shared == 0 or not (width % shared or group_size % shared or shared % span))


def plan_fusion(program: Program) -> Fusion:
    """Finds all chains."""
    found = Fusion()
    for node in program.calls(ops.quantize_dequantize.target):
        if all(integer_product(user) for user in node.users):
            # Codes are made where the first linear layer asks for them, in the groups of its weight.
            found.inside.add(node)
            norm = node.args[0]
            if isinstance(norm, fx.Node) and norm.target in NORMS and len(norm.users) == 1:
                found.norm[node] = norm
                found.inside.add(norm)
    for node in program.calls(ops.quantize_tokens.target):
        parts = cached_parts(node)
        if parts is not None:
            codes, scale = parts
            found.codes[codes] = (node, scale)
            found.inside.update({node, *node.users, scale})
    for node in program.calls(ops.dequantize_tokens.target):
        if all(_reads_as_keys(user, node) for user in node.users):
            found.held.add(node)
            found.inside.add(node)
    for node in program.calls(aten.to.dtype):
        if from_half(node) and all(_reaches_keys(user, node) for user in node.users):
            found.widened.add(node)
    for node in program.calls(ops.kv_cache_update.target):
        new = found.codes[node][0].args[0] if node in found.codes else node.args[1]
        if isinstance(new, fx.Node) and new.target is ops.rope.target and len(new.users) == 1:
            found.rope[node] = new
            found.inside.add(new)
    for node in program.calls(tiled_linear.target, tiled_float_linear.target, tiled_sparse_linear.target):
        _fuse_epilogue(node, found)
    return found


def cached_parts(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The updates of codes and of scales that write a rounding to one place each; None if it has other readers."""
    parts: dict[int, fx.Node] = {}
    for item in node.users:
        users = list(item.users)
        if item.target is not operator.getitem or len(users) != 1 or users[0].target is not ops.kv_cache_update.target:
            return None
        parts[int(item.args[1])] = users[0]
    if len(parts) != 2 or parts[0].args[2] is not parts[1].args[2]:
        return None
    return parts[0], parts[1]


def _reads_as_keys(user: fx.Node, node: fx.Node) -> bool:
    """Whether an attention reads a node as its keys or values, and nothing else."""
    places = [i for i, argument in enumerate(user.args) if argument is node]
    return user.target is ops.attention.target and bool(places) and set(places) <= {1, 2}


def _reaches_keys(user: fx.Node, node: fx.Node) -> bool:
    """Whether attentions read a node, or a slice of it, as their keys or values, and nothing else reads it."""
    if user.target is aten.slice.Tensor:
        return all(_reads_as_keys(reader, user) for reader in user.users)
    return _reads_as_keys(user, node)


def from_half(node: fx.Node) -> bool:
    """Whether a node is a tensor in float16 converted to float32."""
    if node.target is not aten.to.dtype or not isinstance(node.args[0], fx.Node):
        return False
    return (node.args[0].meta["val"].dtype, node.meta["val"].dtype) == (torch.float16, torch.float32)


def _fuse_epilogue(node: fx.Node, found: Fusion) -> None:
    users = list(node.users)
    # The sum of two linear layers ends one of them, and takes the other as its residual.
    if len(users) == 1 and users[0] not in found.linear and _is_residual(node, users[0]):
        found.linear[users[0]] = node
        found.inside.add(node)
        return
    gated = _gated_user(node, users)
    if gated is not None:
        found.linear[gated] = node
        found.inside.update({node, *users})


def _is_residual(node: fx.Node, user: fx.Node) -> bool:
    if user.target is not aten.add.Tensor or user.kwargs or user.args[0] is user.args[1]:
        return False
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in user.args]
    if not all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values):
        return False
    return bool(values[0].shape == values[1].shape)


def _gated_user(node: fx.Node, users: list[fx.Node]) -> fx.Node | None:
    """The gated activation over the two halves of a linear layer."""
    width = node.meta["val"].shape[-1]
    half = width // 2
    if half % ROWS or len(users) != 2:
        return None
    if any(user.target is not aten.slice.Tensor for user in users):
        return None
    users.sort(key=lambda user: int(user.args[2]))
    for user, start in zip(users, (0, half), strict=True):
        if user.args[1] not in (-1, node.meta["val"].dim() - 1) or user.args[2] != start:
            return None
        if len(user.users) != 1 or user.meta["val"].shape[-1] != half:
            return None
    gated = next(iter(users[0].users))
    if gated.target is not ops.gated_activation.target or list(gated.args[:2]) != users:
        return None
    return gated if gated.args[2] in ACTIVATIONS else None
