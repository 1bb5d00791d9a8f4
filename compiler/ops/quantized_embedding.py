"""Looking up rows of a table that is stored in low-bit codes; layout in `graphwright.packing`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op


@op
def quantized_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """dequantize(weight)[indices], touching only the rows asked for.

    Args:
        indices: integers of any shape.
        weight: packed codes of [N, embedding_dim padded to groups].
        scale: [N, G].
        zero_point: [N, G] in codes, or None for a symmetric table.
        format: a name in `packing.FORMATS`.
        group_size: codes that share a scale.
        embedding_dim: width of a row.
        dtype: floating-point dtype of the result.

    Returns:
        [*indices.shape, embedding_dim] of `dtype`.
    """
    rows = weight[indices].flatten(0, -2)
    zero = None if zero_point is None else zero_point[indices].flatten(0, -2)
    dense = packing.dequantize(rows, scale[indices].flatten(0, -2), zero, format, group_size)
    return dense[:, :embedding_dim].to(dtype).unflatten(0, indices.shape)


@quantized_embedding.fake
def _fake(
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


@quantized_embedding.cost
def _cost(indices: TensorInfo, weight: TensorInfo, scale: TensorInfo, *_rest: object, **_more: object) -> Cost:
    width = weight.shape[1] * weight.dtype.itemsize + scale.shape[1] * scale.dtype.itemsize
    return Cost(bytes=indices.bytes + 2 * indices.numel * width)


@quantized_embedding.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for format, group_size, asymmetric in (
        ("int8", 40, False),
        ("int4", 32, True),
        ("int8", 32, True),
        ("int4_offset", 32, True),
    ):
        groups = -(-40 // group_size)
        low, high = packing.FORMATS[format].low, packing.FORMATS[format].high
        codes = torch.randint(low, high + 1, (11, groups * group_size))
        weight = packing.pack(codes, format, group_size)
        scale = torch.rand(11, groups)
        zero = torch.randint(low, high + 1, (11, groups)).float() if asymmetric else None
        indices = torch.randint(0, 11, (2, 3))
        note = f"{format}, group {group_size}, asymmetric {asymmetric}"
        yield Sample((indices, weight, scale, zero, format, group_size, 40, dtype), note=note)
