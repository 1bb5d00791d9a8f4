"""Linear layers for Inductor: reductions where few rows are multiplied, matrix products where many are.

With one row a linear layer is a walk over its weights at memory speed. Written as multiply and sum it fuses with what
precedes it and needs no copy of the weights in another type; the order [N, M, K] makes the weights the outermost
loop. Activations are prepared in a buffer of their own first, or Inductor would compute them anew for every row of
the weight. Several slices along K are added before the sum, so that the additions do not wait for each other.
"""

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing
from graphwright.backends.inductor.barrier import realize
from graphwright.backends.inductor.support import FAST_FORMATS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """aten.linear over few rows."""
    rows = _rows(x, weight.shape[1])
    product = _sum_of_slices(rows, weight, 2)
    return _finish(product, x, bias)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """Quantized linear over few rows; no weight is ever dequantized to memory."""
    if format not in FAST_FORMATS:
        return quantized_matmul(x, weight, scale, zero_point, bias, format, group_size)
    groups = scale.shape[1]
    rows = _rows(x, groups * group_size)
    if format == "int4_offset":
        product = _offset_nibbles(rows, weight, scale, zero_point, group_size)
    elif format == "int4":
        product = _nibbles(rows, weight, scale, zero_point, group_size)
    elif groups == 1:
        product = _sum_of_slices(rows, weight, 4)
        if zero_point is not None:
            product = product - zero_point.float() * realize(rows.sum(1))
        product = product * scale.float()
    else:
        product = _grouped_bytes(rows, weight, scale, zero_point, group_size)
    return _finish(product, x, bias)


def quantized_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """Quantized linear over many rows: dequantize once, then one matrix product."""
    dense = dequantize(weight, scale, zero_point, format, group_size)
    return functional.linear(x, dense[:, : x.shape[-1]].to(x.dtype), bias)


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, group_size: int) -> Tensor:
    """`packing.dequantize` by shifts; a concatenation of nibbles would be a kernel of its own."""
    if format not in FAST_FORMATS:
        return packing.dequantize(packed, scale, zero_point, format, group_size)
    groups = scale.shape[-1]
    if format == "int8":
        codes = packed.view(-1, groups, group_size)
    else:
        shifts = (torch.arange(2, dtype=torch.int32, device=packed.device) * 4)[:, None]
        halves = packed.view(-1, groups, 1, group_size // 2).to(torch.int32)
        codes = ((halves >> shifts) & 15).view(-1, groups, group_size)
    if format == "int4_offset":
        offset = 0.0 if zero_point is None else zero_point.float().unsqueeze(-1)
        return (codes.float() * scale.float().unsqueeze(-1) + offset).view(-1, groups * group_size)
    zero = packing.FORMATS[format].zero if zero_point is None else zero_point.float().unsqueeze(-1)
    return ((codes.float() - zero) * scale.float().unsqueeze(-1)).view(-1, groups * group_size)


def _rows(x: Tensor, width: int) -> Tensor:
    """X as float32 [M, width] in a buffer of its own, padded with zeros."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if width != x.shape[-1]:
        rows = functional.pad(rows, (0, width - x.shape[-1]))
    return realize(rows)


def _finish(product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """[N, M] to the op's result."""
    result = product.t().to(x.dtype) if bias is None else (product.t() + bias.float()).to(x.dtype)
    return realize(result).view(*x.shape[:-1], product.shape[0])


def _sum_of_slices(rows: Tensor, weight: Tensor, slices: int) -> Tensor:
    width = rows.shape[1]
    while width % (slices * 16) and slices > 1:
        slices //= 2
    step = width // slices
    total: Tensor | None = None
    for start in range(0, width, step):
        part = weight[:, None, start : start + step].float() * rows[None, :, start : start + step]
        total = part if total is None else total + part
    assert total is not None  # noqa: S101  (for the type checker: width is positive)
    return total.sum(-1)


def _nibbles(rows: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """Codes lo | hi << 4 against pairs of activations, without a shift.

    With p the byte: lo * a + hi * b = (p & 15) * (a - b / 16) + p * (b / 16). What the zero point takes away,
    zero * (a + b), is prepared per pair.
    """
    groups, half = scale.shape[1], group_size // 2
    pairs = rows.view(-1, groups, 2, half)
    low, high = pairs[:, :, 0], pairs[:, :, 1] * (1 / 16)
    first, second = realize(low - high), realize(high)
    offset = pairs[:, :, 0] + pairs[:, :, 1]
    taken = realize(offset * packing.FORMATS["int4"].zero if zero_point is None else offset)[None]
    if zero_point is not None:
        taken = taken * zero_point.float()[:, None, :, None]
    packed = weight.view(-1, 1, groups, half)
    terms = (packed.to(torch.int32) & 15).float() * first[None] + (packed.float() * second[None] - taken)
    return (terms * scale.float()[:, None, :, None]).sum((-1, -2))


def _offset_nibbles(rows: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """As `_nibbles`; what the offset adds is the offset times the sum of the group's activations."""
    groups, half = scale.shape[1], group_size // 2
    pairs = rows.view(-1, groups, 2, half)
    low, high = pairs[:, :, 0], pairs[:, :, 1] * (1 / 16)
    first, second = realize(low - high), realize(high)
    packed = weight.view(-1, 1, groups, half)
    terms = (packed.to(torch.int32) & 15).float() * first[None] + packed.float() * second[None]
    terms = terms * scale.float()[:, None, :, None]
    if offset is not None:
        terms = terms + realize(pairs[:, :, 0] + pairs[:, :, 1])[None] * offset[:, None, :, None]
    return terms.sum((-1, -2))


def _grouped_bytes(rows: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    groups = scale.shape[1]
    codes = weight.view(-1, 1, groups, group_size).float()
    if zero_point is not None:
        codes = codes - zero_point.float()[:, None, :, None]
    terms = codes * rows.view(1, -1, groups, group_size) * scale.float()[:, None, :, None]
    return terms.sum((-1, -2))
