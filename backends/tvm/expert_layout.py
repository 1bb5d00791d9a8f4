"""Weights of experts in the layout of the CPU kernels; see `graphwright.backends.tvm.layout`.

    experts(x, weights, indices, up, …)            →  tiled_experts(x, weights, indices, tiles of up, …)
    quantized_experts(x, weights, indices, up, …)  →  tiled_experts(x, weights, indices, tiles of up, …)

The tiles of all experts lie one behind the other. Where there is a gate, its rows and those of `up` are each padded to
whole tiles, so that a thread finds both at the same distance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphwright import ops
from graphwright.kernels.tir import tiles
from graphwright.match import arguments
from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.rewrite import Editor


@dataclass(frozen=True)
class Stack:
    """One product's weights of all experts.

    Attributes:
        tensors: tiles, and for codes scales and zero points or no third.
        bias: one tensor [experts * rows], or none.
        rows: outputs of one expert, with the padding.
    """

    tensors: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    rows: int


def tiled_stack(
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    *,
    parts: int,
) -> Stack:
    """Cuts weights [E, N, K], or their packed codes, into tiles, after padding each of `parts` equal parts of rows.

    A gate and `up` are two parts. With 0, the end of the last tile is not stored by kernels.
    """
    weight = _padded(weight, parts)
    scale, zero_point, bias = (None if t is None else _padded(t, parts) for t in (scale, zero_point, bias))
    if scale is None:
        made = [torch.cat([tiles.tile_floats(one) for one in weight])]
    else:
        made = [torch.cat([tiles.tile_codes(one, format, group_size) for one in weight])]
        made.append(torch.cat([tiles.tile_groups(one) for one in scale]))
    if zero_point is not None:
        made.append(torch.cat([tiles.tile_zero_points(one, format) for one in zero_point]))
    biases = () if bias is None else (bias.flatten(),)
    return Stack(tuple(made), biases, int(weight.shape[1]))


def _padded(values: Tensor, parts: int) -> Tensor:
    """Rows [E, N, …] with each part of them padded to whole tiles."""
    missing = -(values.shape[1] // parts) % tiles.ROWS if parts else 0
    ends = (0, 0) * (values.dim() - 2) + (0, missing)
    return torch.cat([functional.pad(part, ends) for part in values.chunk(parts, 1)], 1) if missing else values


def _unpadded(values: Tensor | None, rows: int, parts: int) -> Tensor | None:
    """Inverse of `_padded`; `rows` of each part are kept."""
    return None if values is None else torch.cat([part[:, :rows] for part in values.chunk(parts, 1)], 1)


@op
def tiled_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_zero_point: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    down_zero_point: Tensor | None,
    down_bias: Tensor | None,
    format: str,
    up_group_size: int,
    down_group_size: int,
    activation: str,
    gated: bool,
    alpha: float,
    limit: float,
    num_experts: int,
    inner_features: int,
    out_features: int,
) -> Tensor:
    """`experts` or `quantized_experts` with weights in tiles.

    Args:
        x: [M, K], float32.
        weights: [M, J].
        indices: int64 [M, J].
        up: tiles of all experts, float32 or uint8.
        up_scale: [E * tiles, G, 16], or None for floats.
        up_zero_point: uint8 [E * tiles, G, 16] or None.
        up_bias: [E * rows] with the padding, or None.
        down: as `up`.
        down_scale: as `up_scale`.
        down_zero_point: as `up_zero_point`.
        down_bias: [E * N] or None.
        format: `float32`, `int8` or `int4`.
        up_group_size: weights that share a scale along K; not used for floats.
        down_group_size: as `up_group_size`.
        activation: as of `experts`, like the next three.
        gated: see there.
        alpha: see there.
        limit: see there.
        num_experts: E.
        inner_features: F.
        out_features: N.

    Returns:
        [M, N].
    """
    parts = 2 if gated else 1
    first = _untiled(
        (up, up_scale, up_zero_point, up_bias), format, up_group_size, num_experts, up_rows(inner_features, gated)
    )
    first = [_unpadded(part, inner_features, parts) for part in first]
    second = _untiled(
        (down, down_scale, down_zero_point, down_bias), format, down_group_size, num_experts, out_features
    )
    rest = (activation, gated, alpha, limit)
    if format == "float32":
        return ops.experts.reference(x, weights, indices, first[0], first[3], second[0], second[3], *rest)
    groups = (format, up_group_size, down_group_size)
    return ops.quantized_experts.reference(x, weights, indices, *first, *second, *groups, *rest)


def up_rows(inner_features: int, gated: bool) -> int:
    """Rows of one expert's `up`, with the gate's and the padding."""
    return -(-inner_features // tiles.ROWS) * tiles.ROWS * (2 if gated else 1)


def _untiled(
    parts: tuple[Tensor | None, ...], format: str, group_size: int, count: int, rows: int
) -> list[Tensor | None]:
    """Weight, scale, zero point and bias of every expert, as they were stacked."""
    weight, scale, zero, bias = parts
    assert weight is not None  # noqa: S101
    if scale is None:
        dense = [tiles.untile_floats(one, rows) for one in weight.chunk(count)]
    else:
        dense = [tiles.untile_codes(one, format, group_size, rows) for one in weight.chunk(count)]
    scales = None if scale is None else torch.stack([tiles.untile_groups(one, rows) for one in scale.chunk(count)])
    points = None if zero is None else [tiles.untile_zero_points(one, format, rows) for one in zero.chunk(count)]
    stacked = None if points is None else torch.stack(points)
    return [torch.stack(dense), scales, stacked, None if bias is None else bias.view(count, rows)]


@tiled_experts.fake
def _fake(x: Tensor, *rest: Any, **_more: object) -> Tensor:
    return x.new_empty(x.shape[0], rest[-1])


@tiled_experts.cost
def _cost(x: TensorInfo, weights: TensorInfo, indices: TensorInfo, *rest: Any, **_more: object) -> Cost:
    gated, inner, outputs = rest[12], rest[-2], rest[-1]
    return Cost(flops=2 * indices.numel * inner * ((2 if gated else 1) * x.shape[1] + outputs))


@tiled_experts.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in ops.experts.samples_of(dtype):
        x, shares, indices, up, up_bias, down, down_bias, activation, *rest = sample.args
        gated, alpha, limit = list(rest) + [True, 1.0, 0.0][len(rest) :]
        stacks = _stacks((up, None, None, up_bias), (down, None, None, down_bias), ("float32", 0, 0), gated)
        sizes = (up.shape[0], down.shape[2], down.shape[1])
        tail = ("float32", 0, 0, activation, gated, alpha, limit, *sizes)
        yield Sample((x, shares, indices, *stacks, *tail), note=sample.note)


def _stacks(
    first: Sequence[Any], second: Sequence[Any], groups: tuple[str, int, int], gated: bool
) -> list[Tensor | None]:
    """The weight arguments of `tiled_experts`."""
    format, *group_sizes = groups
    made: list[Tensor | None] = []
    for given, size, parts in zip((first, second), group_sizes, (2 if gated else 1, 0), strict=True):
        weight, scale, zero, bias = given
        stack = tiled_stack(weight, scale, zero, bias, format, size, parts=parts)
        made += [*stack.tensors, *(None,) * (3 - len(stack.tensors)), *(stack.bias or (None,))]
    return made


PARTS = ("up", "up_scale", "up_zero_point", "up_bias", "down", "down_scale", "down_zero_point", "down_bias")


def tile_experts(editor: Editor) -> None:
    """Puts `tiled_experts` in the place of every call with constant weights that fit in tiles."""
    program = editor.program
    for node in list(program.calls(ops.experts.target, ops.quantized_experts.target)):
        if obstacle(node):
            continue
        given = arguments(node)
        groups = (given.get("format", "float32"), given.get("up_group_size", 0), given.get("down_group_size", 0))
        parts = [given.get(name) for name in PARTS]
        held = [None if part is None else program.weight(part) for part in parts]
        count, (inner, outputs) = held[0].shape[0], sizes(node)
        made = _stacks(tuple(held[:4]), tuple(held[4:]), groups, given["gated"])
        stored = [
            None if tensor is None else editor.weight(f"{part.target}_tiles", tensor.contiguous(), before=node)
            for part, tensor in zip(parts, made, strict=True)
        ]
        rest = (given["activation"], given["gated"], given["alpha"], given["limit"], count, inner, outputs)
        routed = (given["x"], given["weights"], given["indices"])
        editor.replace(node, editor.call(tiled_experts, *routed, *stored, *groups, *rest, before=node))
        editor.retire(node)


def sizes(node: fx.Node) -> tuple[int, int]:
    """F and N of a call of experts."""
    given = arguments(node)
    rows = int(given["up"].meta["val"].shape[1])
    return rows // 2 if given["gated"] else rows, int(given["down"].meta["val"].shape[1])


def obstacle(node: fx.Node) -> str:
    """Why a call's weights have no tiles, or nothing."""
    given = arguments(node)
    parts = {name: given[name] for name in PARTS if given.get(name) is not None}
    if any(part.op != "get_attr" for part in parts.values()):
        return "its weights are computed"
    if "format" not in given:
        found = {str(part.meta["val"].dtype) for part in parts.values()} - {"torch.float32"}
        return f"its weights are {', '.join(sorted(found))}, and kernels take float32" if found else ""
    format = str(given["format"])
    for size in (given["up_group_size"], given["down_group_size"]):
        if not tiles.fits(format, int(size)):
            return f"no tiles for {format} in groups of {size}"
    points = [parts[name].meta["val"].dtype for name in ("up_zero_point", "down_zero_point") if name in parts]
    return "its zero points are fractions, and tiles hold whole ones" if torch.float16 in points else ""
