"""The expert MLPs of a mixture of experts whose weights are stored in low-bit codes; see `graphwright.ops.experts`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright import packing
from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.ops.experts import activate, dispatch


@op
def quantized_experts(
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
    """`experts` over packed weights; only the weights of chosen experts are unpacked.

    Args:
        x: [M, K].
        weights: [M, J], floating point.
        indices: int64 [M, J].
        up: packed codes [E, 2F or F, bytes], rows laid out as in `experts`.
        up_scale: [E, 2F or F, G].
        up_zero_point: as `up_scale`, in codes; or None for a symmetric weight.
        up_bias: [E, 2F or F] or None.
        down: packed codes [E, N, bytes].
        down_scale: [E, N, G].
        down_zero_point: as `down_scale`, or None.
        down_bias: [E, N] or None.
        format: a name in `packing.FORMATS`, of both weights.
        up_group_size: weights of `up` that share a scale along K.
        down_group_size: weights of `down` that share a scale along F.
        activation: as `experts` takes it.
        gated: as `experts` takes it.
        alpha: as `experts` takes it.
        limit: as `experts` takes it.

    Returns:
        [M, N] in the dtype of `x`.
    """

    def product(
        rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, expert: int, group: int
    ) -> Tensor:
        one = None if zero is None else zero[expert]
        dense = packing.dequantize(codes[expert], scale[expert], one, format, group)[:, : rows.shape[1]]
        return functional.linear(rows, dense.to(rows.dtype), None if bias is None else bias[expert])

    def mlp(expert: int, rows: Tensor) -> Tensor:
        inner = product(rows, up, up_scale, up_zero_point, up_bias, expert, up_group_size)
        inner = activate(inner, activation, gated, alpha, limit)
        return product(inner, down, down_scale, down_zero_point, down_bias, expert, down_group_size)

    return dispatch(x, weights, indices, up.shape[0], down.shape[1], mlp)


@quantized_experts.fake
def _fake(x: Tensor, *given, **_more):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], given[6].shape[1])


@quantized_experts.cost
def _cost(x: TensorInfo, weights: TensorInfo, indices: TensorInfo, up: TensorInfo, *rest, **_more) -> Cost:  # type: ignore[no-untyped-def]
    hidden = x.shape[1]
    down = rest[3]
    width = up.shape[1] / 2 if rest[-1] is not False else up.shape[1]
    return Cost(flops=2 * indices.numel * (up.shape[1] * hidden + down.shape[1] * width))


@quantized_experts.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def packed(count: int, rows: int, width: int, format: str, group: int) -> tuple[Tensor, Tensor, None]:
        kind, groups = packing.FORMATS[format], -(-width // group)
        codes = torch.randint(kind.low, kind.high + 1, (count * rows, groups * group))
        stored = packing.pack(codes, format, group).unflatten(0, (count, rows))
        return stored, torch.rand(count, rows, groups) * 0.05, None

    for format, group in (("int4", 16), ("int8", 24)):
        for tokens in (1, 5):
            indices = torch.rand(tokens, 4).argsort(-1)[:, :2]
            routed = (torch.randn(tokens, 20, dtype=dtype), torch.rand(tokens, 2), indices)
            up, down = packed(4, 24, 20, format, group), packed(4, 20, 12, format, group)
            rest = (format, group, group, "silu")
            yield Sample((*routed, *up, None, *down, None, *rest), note=f"{format}, {tokens} tokens")
