"""Weights in the layout of the CPU kernels, as a rewrite of the graph: what is saved is what kernels read.

    quantized_linear(x, weight, …)  →  tiled_linear(x, tiles of weight, …)

The tiled ops have eager references like every op, so a program in this layout still runs anywhere.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.kernels.tir import tiles
from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.program import Program
from graphwright.rewrite import Editor


@op
def tiled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    out_features: int,
) -> Tensor:
    """`quantized_linear` with a weight in tiles.

    Args:
        x: [..., K], floating point.
        weight: uint8 [N/16, bytes of a tile], see `graphwright.kernels.tir.tiles`.
        scale: [N/16, G, 16].
        zero_point: uint8 [N/16, G, 16], or None for a symmetric weight.
        bias: [N] or None.
        format: `int8` or `int4`.
        group_size: weights that share a scale along K.
        out_features: N.

    Returns:
        [..., N].
    """
    packed = tiles.untile_codes(weight, format, group_size, out_features)
    zero = None if zero_point is None else tiles.untile_zero_points(zero_point, format, out_features)
    scales = tiles.untile_groups(scale, out_features)
    return ops.quantized_linear.reference(x, packed, scales, zero, bias, format, group_size)


@tiled_linear.fake
def _linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@tiled_linear.cost
def _linear_cost(x: TensorInfo, weight: TensorInfo, *rest: object, **_more: object) -> Cost:
    return Cost(flops=2 * x.numel * weight.shape[0] * tiles.ROWS)


@tiled_linear.samples
def _linear_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in ops.quantized_linear.samples_of(dtype):
        x, weight, scale, zero, bias, format, group_size = sample.args
        if fits(format, group_size):
            tiled = _tiled(weight, scale, zero, format, group_size)
            yield Sample((x, *tiled, bias, format, group_size, weight.shape[0]), note=sample.note)


@op
def tiled_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """`quantized_embedding` with a table in tiles; see there and `tiled_linear`."""
    rows = weight.shape[0] * tiles.ROWS
    packed = tiles.untile_codes(weight, format, group_size, rows)
    zero = None if zero_point is None else tiles.untile_zero_points(zero_point, format, rows)
    scales = tiles.untile_groups(scale, rows)
    arguments = (indices, packed, scales, zero, format, group_size, embedding_dim, dtype)
    return ops.quantized_embedding.reference(*arguments)


@tiled_embedding.fake
def _embedding_fake(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty((*indices.shape, embedding_dim), dtype=dtype, device=weight.device)


@tiled_embedding.cost
def _embedding_cost(
    indices: TensorInfo, weight: TensorInfo, scale: TensorInfo, *_rest: object, **_more: object
) -> Cost:
    width = (weight.shape[1] * weight.dtype.itemsize + scale.shape[1] * scale.dtype.itemsize) // tiles.ROWS
    return Cost(bytes=indices.bytes + 2 * indices.numel * width)


@tiled_embedding.samples
def _embedding_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in ops.quantized_embedding.samples_of(dtype):
        indices, weight, scale, zero, format, group_size, *rest = sample.args
        if group_size % tiles.STEP[format] == 0:
            tiled = _tiled(weight, scale, zero, format, group_size)
            yield Sample((indices, *tiled, format, group_size, *rest), note=sample.note)


def _tiled(
    weight: Tensor, scale: Tensor, zero: Tensor | None, format: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    points = None if zero is None else tiles.tile_zero_points(zero, format)
    return tiles.tile_codes(weight, format, group_size), tiles.tile_groups(scale), points


def fits(format: str, group_size: int) -> bool:
    """Whether a weight can be cut into tiles."""
    return format in tiles.STEP and group_size % tiles.STEP[format] == 0


def fractional(node: fx.Node) -> bool:
    """Whether a quantized layer's zero points are fractions, which tiles do not hold."""
    zero = node.args[3]
    return isinstance(zero, fx.Node) and zero.meta["val"].dtype == torch.float16


def tile_weights(program: Program) -> Program:
    """The program with every quantized weight that fits in tiles; a weight that two nodes read stays one."""
    made: dict[str, str] = {}
    with Editor(program, "tile_weights") as editor:
        for node in list(program.calls(ops.quantized_linear.target, ops.quantized_embedding.target)):
            linear = node.target is ops.quantized_linear.target
            format, group_size = node.args[5:7] if linear else node.args[4:6]
            if not fits(str(format), int(group_size)) or fractional(node):
                continue
            outputs = node.args[1].meta["val"].shape[0]
            parts = _tiled_nodes(editor, node, str(format), int(group_size), made)
            if linear:
                new = editor.call(tiled_linear, node.args[0], *parts, *node.args[4:], outputs, before=node)
            else:
                new = editor.call(tiled_embedding, node.args[0], *parts, *node.args[4:], before=node)
            editor.replace(node, new)
    return program


def _tiled_nodes(
    editor: Editor, node: fx.Node, format: str, group_size: int, made: dict[str, str]
) -> list[fx.Node | None]:
    """Nodes that read the tiles of the weight, scale and zero point of `node`."""
    tilings = (
        lambda tensor: tiles.tile_codes(tensor, format, group_size),
        tiles.tile_groups,
        lambda tensor: tiles.tile_zero_points(tensor, format),
    )
    found: list[fx.Node | None] = []
    for source, tile in zip(node.args[1:4], tilings, strict=True):
        if not isinstance(source, fx.Node):
            found.append(None)
            continue
        name = str(source.target)
        if name not in made:
            made[name] = str(editor.weight(f"{name}_tiles", tile(editor.program.weight(name)), before=node).target)
        found.append(editor.read(made[name], before=node))
    return found
