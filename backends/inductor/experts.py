"""Mixtures of experts for Inductor: reductions over gathered weights where few tokens come, the op's own kernel else.

With few tokens each choice of an expert is a walk over that expert's weights, found through its index: Inductor fuses
the lookup and the unpacking into the sum, so that only chosen experts are read and nothing is copied. With many tokens
the choices are sorted by expert, which is known only at run time; there the op is called as it is.
"""

import torch
from torch import Tensor

from graphwright.backends.inductor.barrier import realize
from graphwright.backends.inductor.linear import dequantize
from graphwright.ops.experts import activate


def experts_by_reduction(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gated: bool = True,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """`experts` over few tokens."""
    ids, rows = _choices(x, indices)
    inner = _product(rows, up[ids], up_bias, ids)
    inner = realize(activate(inner, activation, gated, alpha, limit))
    return _combine(_product(inner, down[ids], down_bias, ids), weights, indices, x)


def quantized_experts_by_reduction(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero_point: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero_point: Tensor | None,
    down_bias: Tensor | None,
    format: str,
    up_group_size: int,
    down_group_size: int,
    activation: str,
    gated: bool = True,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """`quantized_experts` over few tokens."""
    ids, rows = _choices(x, indices)
    chosen = _unpacked(up, up_scale, up_zero_point, ids, format, up_group_size, rows.shape[1])
    inner = realize(activate(_product(rows, chosen, up_bias, ids), activation, gated, alpha, limit))
    chosen = _unpacked(down, down_scale, down_zero_point, ids, format, down_group_size, inner.shape[1])
    return _combine(_product(inner, chosen, down_bias, ids), weights, indices, x)


def _choices(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Expert and float32 input of each choice, [S] and [S, K], with the choices of a token side by side.

    A choice that was dropped walks over the first expert, and counts nothing.
    """
    tokens, top_k = indices.shape
    rows = x.float()[:, None, :].expand(tokens, top_k, x.shape[1])
    return realize(indices.reshape(-1).clamp_min(0)), realize(rows.reshape(tokens * top_k, x.shape[1]))


def _product(rows: Tensor, chosen: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Rows [S, K] times weights [S, N, K]."""
    result = (chosen.float() * rows[:, None, :]).sum(-1)
    return realize(result if bias is None else result + bias[ids].float())


def _unpacked(
    codes: Tensor, scale: Tensor, zero: Tensor | None, ids: Tensor, format: str, group_size: int, width: int
) -> Tensor:
    chosen = None if zero is None else zero[ids].flatten(0, 1)
    dense = dequantize(codes[ids].flatten(0, 1), scale[ids].flatten(0, 1), chosen, format, group_size)
    return dense.view(ids.shape[0], codes.shape[1], -1)[:, :, :width]


def _combine(outputs: Tensor, weights: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    shares = torch.where(indices < 0, 0.0, weights.float())
    parts = outputs.view(*weights.shape, outputs.shape[1]) * shares[:, :, None]
    return realize(parts.sum(1).to(x.dtype))
