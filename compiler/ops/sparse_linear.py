"""A linear layer whose weight is stored without its zeros; layouts in `graphwright.sparsity`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing, sparsity
from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.sparsity import Pattern


@op
def sparse_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    layout: str,
    format: str,
    group_size: int,
    outputs: int,
) -> Tensor:
    """X @ dense(values, places).T + bias, in the dtype of `x`.

    Args:
        x: [..., K], floating point.
        values: of layout `2:4`: [N, 2, K / 4], or packed codes of [2 N, K / 4]; of blocks: [blocks, R * C], or the
            packed codes of all of them as one row; of `2:4 tensor cores`: float16 or bfloat16 [N, K / 2].
        places: of layout `2:4`: uint8 [N, ceil(K / 8)]; of blocks: uint8 [N / R, ceil(K / C / 8)]; of
            `2:4 tensor cores`: int16 [N, K / 16].
        scale: [N, G], float16 or float32, or None for floating-point values.
        zero_point: [N, G] in codes, or None.
        bias: [N] or None.
        layout: `2:4`, `2:4 tensor cores`, or blocks `RxC`; `1x1` is a bitmask of single weights.
        format: a name in `packing.FORMATS`, or empty for floating-point values.
        group_size: columns of the dense weight that share a scale; of layout `2:4` a multiple of four that divides K.
        outputs: N.

    Returns:
        [..., N].
    """
    if layout == sparsity.TENSOR_CORES:
        if x.is_cuda:
            return on_tensor_cores(x, values, places, bias)
        weight = sparsity.expand_from_tensor_cores(values, places)
    elif layout == "2:4":
        weight = _halves(values, places, scale, zero_point, format, group_size)
    else:
        weight = _blocks(values, places, scale, zero_point, layout, format, group_size, x.shape[-1])
    return functional.linear(x, weight.to(x.dtype), bias)


def on_tensor_cores(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
    """The product by torch's CUTLASS kernel, which takes a multiple of eight columns."""
    flat = x.flatten(0, -2).to(values.dtype)
    columns = functional.pad(flat, (0, 0, 0, -len(flat) % 8)).t()
    product = torch._sparse_semi_structured_mm(values, metadata, columns).t()[: len(flat)]
    out = product if bias is None else product + bias
    return out.reshape(*x.shape[:-1], -1).to(x.dtype)


def _halves(
    values: Tensor, places: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: str, group_size: int
) -> Tensor:
    if scale is None:
        return sparsity.expand(values, places)
    zeros = None if zero_point is None else zero_point.repeat_interleave(2, 0)
    plain = packing.dequantize(values, scale.repeat_interleave(2, 0), zeros, format, group_size // 4)
    return sparsity.expand(plain.unflatten(0, (-1, 2)), places)


def _blocks(
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    layout: str,
    format: str,
    group_size: int,
    width: int,
) -> Tensor:
    block = Pattern.parse(layout)
    kept = sparsity.blocks_kept(places, width // block.columns)
    if scale is None:
        return sparsity.from_blocks(values, kept, block.rows, block.columns)
    codes = packing.unpack(values[None], format, packing.FORMATS[format].unit)[0]
    dense = sparsity.from_blocks(codes, kept, block.rows, block.columns)
    zero = None if zero_point is None else _along(zero_point, group_size, width)
    wide = packing.decode(dense, format, zero) * _along(scale, group_size, width)
    stored = kept.repeat_interleave(block.rows, 0).repeat_interleave(block.columns, 1)
    return wide.masked_fill(~stored, 0.0)


def _along(values: Tensor, group_size: int, width: int) -> Tensor:
    """Values [N, G] of groups for every column, float32 [N, width]."""
    return values.float().repeat_interleave(group_size, 1)[:, :width]


@sparse_linear.fake
def _fake(x: Tensor, *rest: object, **_more: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


@sparse_linear.cost
def _cost(x: TensorInfo, values: TensorInfo, places: TensorInfo, *rest: object, **_more: object) -> Cost:
    # What a kernel that skips zeros does; where there is none, the dense weight is multiplied.
    outputs, layout, format = rest[-1], rest[3], str(rest[4])
    if layout in ("2:4", sparsity.TENSOR_CORES):
        return Cost(flops=x.numel * outputs)
    share = packing.FORMATS[format].bits if format else 8 * values.dtype.itemsize
    stored = values.numel * values.dtype.itemsize * 8 // share
    return Cost(flops=2 * stored * x.numel // x.shape[-1])


@sparse_linear.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    if dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(64, 128, dtype=dtype)
        weight *= sparsity.Pattern(2, 4).keep(weight.abs().float(), 0.5)
        stored = sparsity.compress_for_tensor_cores(weight)
        x, layout = torch.randn(2, 5, 128, dtype=dtype), sparsity.TENSOR_CORES
        yield Sample((x, *stored, None, None, None, layout, "", 0, 64), note=layout)
    for rows in ((1, 1), (2, 5)):
        x, bias = torch.randn(*rows, 96, dtype=dtype), torch.randn(40, dtype=dtype) if rows == (2, 5) else None
        weight = torch.randn(40, 96, dtype=dtype)
        halved = weight * sparsity.Pattern(2, 4).keep(weight.abs().float(), 0.5)
        values, places = sparsity.compress(halved)
        yield Sample((x, values, places, None, None, bias, "2:4", "", 0, 40), note=f"2:4, rows {rows}")
        scale = torch.rand(40, 3) * 0.1
        for format in ("int8", "int4"):
            kind = packing.FORMATS[format]
            codes = torch.randint(kind.low, kind.high + 1, (80, 24))
            packed = packing.pack(codes, format, 8)
            yield Sample((x, packed, places, scale, None, bias, "2:4", format, 32, 40), note=f"2:4 {format}")
        for layout in ("1x1", "8x16"):
            block = Pattern.parse(layout)
            kept = block.keep(torch.rand(40, 96), 0.6)
            values, places = sparsity.to_blocks(weight, kept, block.rows, block.columns)
            yield Sample((x, values, places, None, None, bias, layout, "", 0, 40), note=f"blocks {layout}")
            codes, _ = sparsity.to_blocks(torch.randint(0, 16, (40, 96)), kept, block.rows, block.columns)
            flat = functional.pad(codes.flatten(), (0, codes.numel() % 2))
            packed, zero = packing.pack(flat[None], "int4", 2)[0], torch.randint(0, 16, (40, 3), dtype=torch.uint8)
            yield Sample((x, packed, places, scale, zero, bias, layout, "int4", 32, 40), note=f"int4 blocks {layout}")
