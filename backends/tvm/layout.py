"""Weights in the layout of the CPU kernels, as a rewrite of the graph: what is saved is what kernels read.

    quantized_linear(x, weight, …)  →  tiled_linear(x, tiles of weight, …)
    linear(x, weight, bias)         →  tiled_float_linear(x, tiles of weight, bias, …)
    sparse_linear(x, values, …)     →  tiled_sparse_linear(x, tiles of values, …)

The tiled ops have eager references like every op, so a program in this layout still runs anywhere.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphwright import ops
from graphwright.backends.tvm.expert_layout import tile_experts
from graphwright.kernels.tir import tiles
from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


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
        if tiles.fits(format, group_size):
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
        if tiles.fits(format, group_size):
            tiled = _tiled(weight, scale, zero, format, group_size)
            yield Sample((indices, *tiled, format, group_size, *rest), note=sample.note)


@op
def tiled_float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`aten.linear` with a floating-point weight in tiles.

    Args:
        x: [..., K], float32.
        weight: float32 [N/16, K * 16], see `graphwright.kernels.tir.tiles`.
        bias: [N] or None.
        out_features: N.

    Returns:
        [..., N].
    """
    return functional.linear(x, tiles.untile_floats(weight, out_features), bias)


@tiled_float_linear.fake
def _float_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@tiled_float_linear.cost
def _float_linear_cost(x: TensorInfo, weight: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=2 * x.numel * weight.shape[0] * tiles.ROWS)


@tiled_float_linear.samples
def _float_linear_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for outputs, width, with_bias in ((40, 96, True), (16, 7, False), (33, 64, False)):
        weight = tiles.tile_floats(torch.randn(outputs, width, dtype=dtype)).contiguous()
        bias = torch.randn(outputs, dtype=dtype) if with_bias else None
        yield Sample((torch.randn(2, 3, width, dtype=dtype), weight, bias, outputs), note=f"{outputs} by {width}")


@op
def tiled_float_embedding(indices: Tensor, weight: Tensor, num_embeddings: int) -> Tensor:
    """`aten.embedding` of a table [num_embeddings, K] in tiles, which it shares with `tiled_float_linear`."""
    return functional.embedding(indices, tiles.untile_floats(weight, num_embeddings))


@tiled_float_embedding.fake
def _float_embedding_fake(indices: Tensor, weight: Tensor, num_embeddings: int) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1] // tiles.ROWS))


@tiled_float_embedding.cost
def _float_embedding_cost(indices: TensorInfo, weight: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(bytes=indices.bytes + 2 * indices.numel * weight.shape[1] // tiles.ROWS * weight.dtype.itemsize)


@tiled_float_embedding.samples
def _float_embedding_samples(dtype: torch.dtype) -> Iterator[Sample]:
    weight = tiles.tile_floats(torch.randn(37, 12, dtype=dtype)).contiguous()
    yield Sample((torch.randint(0, 37, (2, 3)), weight, 37), note="37 by 12")


@op
def tiled_sparse_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    out_features: int,
    places: Tensor,
) -> Tensor:
    """`sparse_linear` of layout `2:4` with values and places in tiles; the first arguments are those of `tiled_linear`.

    Args:
        x: [..., K], floating point.
        weight: float32 [N/16, K/2 * 16], or codes uint8 [N/16, bytes of a tile].
        scale: [N/16, G, 16], or None for floats.
        zero_point: uint8 [N/16, G, 16], or None.
        bias: [N] or None.
        format: `int8`, `int4`, or empty for floats.
        group_size: columns of the dense weight that share a scale.
        out_features: N.
        places: int32 [N/16, K/32 * 16], see `graphwright.kernels.tir.tiles`.

    Returns:
        [..., N].
    """
    values = tiles.untile_halves(weight, format, group_size, out_features)
    stored = tiles.untile_places(places, x.shape[-1] // 4, out_features)
    scales = None if scale is None else tiles.untile_groups(scale, out_features)
    zero = None if zero_point is None else tiles.untile_zero_points(zero_point, format, out_features)
    rest = (scales, zero, bias, "2:4", format, group_size, out_features)
    return ops.sparse_linear.reference(x, values, stored, *rest)


@tiled_sparse_linear.fake
def _sparse_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    out_features: int,
    places: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@tiled_sparse_linear.cost
def _sparse_cost(x: TensorInfo, weight: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=x.numel * weight.shape[0] * tiles.ROWS)


@tiled_sparse_linear.samples
def _sparse_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in ops.sparse_linear.samples_of(dtype):
        x, values, places, scale, zero, bias, layout, format, group_size, outputs = sample.args
        if layout == "2:4" and tiles.halves_fit(format, group_size):
            weight, scales, zeros, where = _halves(values, places, scale, zero, format, group_size, x.shape[-1])
            yield Sample((x, weight, scales, zeros, bias, format, group_size, outputs, where), note=sample.note)


def _halves(
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    format: str,
    group_size: int,
    width: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Values, scales, zero points and places in tiles."""
    scales = None if scale is None else tiles.tile_groups(scale)
    points = None if zero is None else tiles.tile_zero_points(zero, format)
    return tiles.tile_halves(values, format, group_size), scales, points, tiles.tile_places(places, width // 4)


def _tiled(
    weight: Tensor, scale: Tensor, zero: Tensor | None, format: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    points = None if zero is None else tiles.tile_zero_points(zero, format)
    return tiles.tile_codes(weight, format, group_size), tiles.tile_groups(scale), points


def fractional(node: fx.Node) -> bool:
    """Whether a quantized layer's zero points are fractions, which tiles do not hold."""
    zero = node.args[3]
    return isinstance(zero, fx.Node) and zero.meta["val"].dtype == torch.float16


def stored_float(node: fx.Node, argument: int) -> bool:
    """Whether an argument of a call is a float32 matrix among the program's weights."""
    weight = node.args[argument]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() == 2


def halves_obstacle(node: fx.Node) -> str:
    """Why a sparse linear layer's weight cannot be cut into tiles; empty if it can."""
    zero, layout, format, group_size = node.args[4], *node.args[6:9]
    if layout != "2:4":
        return f"no kernel for sparse weights of layout {layout}, only for 2:4"
    if not tiles.halves_fit(str(format), int(group_size)):
        return f"no tiles for 2:4 weights of {format} in groups of {group_size}"
    floats = not format and node.args[1].meta["val"].dtype != torch.float32
    if floats or (isinstance(zero, fx.Node) and zero.meta["val"].is_floating_point()):
        return "its values are no float32 and no codes with whole zero points"
    return ""


def tile_weights(program: Program) -> Program:
    """The program with every weight that fits in tiles; a weight that two nodes read stays one."""
    made: dict[str, str] = {}
    with Editor(program, "tile_weights") as editor:
        for node in list(program.calls(ops.quantized_linear.target, ops.quantized_embedding.target)):
            linear = node.target is ops.quantized_linear.target
            format, group_size = node.args[5:7] if linear else node.args[4:6]
            if not tiles.fits(str(format), int(group_size)) or fractional(node):
                continue
            outputs = node.args[1].meta["val"].shape[0]
            parts = _tiled_nodes(editor, node, str(format), int(group_size), made)
            if linear:
                new = editor.call(tiled_linear, node.args[0], *parts, *node.args[4:], outputs, before=node)
            else:
                new = editor.call(tiled_embedding, node.args[0], *parts, *node.args[4:], before=node)
            editor.replace(node, new)
            editor.retire(node)
        _tile_floats(editor, made)
        _tile_halves(editor)
        tile_experts(editor)
    return program


def _tile_floats(editor: Editor, made: dict[str, str]) -> None:
    """Cuts the weights of floating-point linear layers, and tables that are tied to one of them."""
    program = editor.program
    layers = [node for node in program.calls(aten.linear.default) if stored_float(node, 1)]
    matrices = {str(node.args[1].target) for node in layers}
    tables = [n for n in program.calls(aten.embedding.default) if str(n.args[0].target) in matrices]
    for node in [*layers, *tables]:
        source = node.args[0 if node in tables else 1]
        name = str(source.target)
        rows = int(source.meta["val"].shape[0])
        if name not in made:
            tiled = tiles.tile_floats(program.weight(name)).contiguous()
            made[name] = str(editor.weight(f"{name}_tiles", tiled, before=node).target)
        weight = editor.read(made[name], before=node)
        if node in tables:
            new = editor.call(tiled_float_embedding, node.args[1], weight, rows, before=node)
        else:
            bias = node.args[2] if len(node.args) > 2 else None
            new = editor.call(tiled_float_linear, node.args[0], weight, bias, rows, before=node)
        editor.replace(node, new)
        editor.retire(node)


def _tile_halves(editor: Editor) -> None:
    """Cuts 2:4 weights; each belongs to one call."""
    for node in editor.program.calls(ops.sparse_linear.target):
        if halves_obstacle(node):
            continue
        x, values, places, scale, zero, bias, _, format, group_size, outputs = node.args
        read = editor.program.weight
        parts = _halves(
            read(values),
            read(places),
            None if scale is None else read(scale),
            None if zero is None else read(zero),
            str(format),
            int(group_size),
            int(x.meta["val"].shape[-1]),
        )
        name = str(node.args[1].target)
        made = [
            None if part is None else editor.weight(f"{name}_{key}", part, before=node)
            for key, part in zip(("tiles", "scale_tiles", "zero_tiles", "places_tiles"), parts, strict=True)
        ]
        rest = (*made[:3], bias, format, group_size, outputs, made[3])
        editor.replace(node, editor.call(tiled_sparse_linear, x, *rest, before=node))
        editor.retire(node)


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
