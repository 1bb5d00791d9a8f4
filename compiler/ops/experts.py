"""The expert MLPs of a mixture of experts, for the chosen experts of each token.

Dropless: every token reaches every expert that it chose, and an expert that nobody chose is not read. Gale et al.
2022, MegaBlocks, arXiv:2211.15841.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright.op import Cost, Sample, TensorInfo, op
from graphwright.ops.gated_activation import ACTIVATIONS

CLAMPED_SWIGLU = "clamped_swiglu"
"""GPT-OSS's gate: (clamp(up) + 1) * gate * sigmoid(alpha * gate), with the gate limited from above."""


@op
def experts(
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
    """y[m] = sum over j of weights[m, j] * mlp of expert indices[m, j] (x[m]).

    Args:
        x: [M, K].
        weights: [M, J], floating point.
        indices: int64 [M, J], each in [0, E), or -1 for a choice that was dropped and adds nothing.
        up: [E, 2F, K], the gate's rows before those of `up`; [E, F, K] where not `gated`.
        up_bias: [E, 2F] or [E, F]; or None.
        down: [E, N, F].
        down_bias: [E, N] or None.
        activation: `silu`, `gelu`, `gelu_tanh`, `relu`, or `clamped_swiglu`, which is gated.
        gated: activation(gate) * up rather than activation(up).
        alpha: of `clamped_swiglu`.
        limit: of `clamped_swiglu`.

    Returns:
        [M, N] in the dtype of `x`; the sum over experts is taken in float32.
    """

    def mlp(expert: int, rows: Tensor) -> Tensor:
        inner = functional.linear(rows, up[expert], None if up_bias is None else up_bias[expert])
        inner = activate(inner, activation, gated, alpha, limit)
        return functional.linear(inner, down[expert], None if down_bias is None else down_bias[expert])

    return dispatch(x, weights, indices, up.shape[0], down.shape[1], mlp)


def activate(inner: Tensor, activation: str, gated: bool, alpha: float, limit: float) -> Tensor:
    """The elementwise middle of an expert: [M, 2F] (or [M, F] where not `gated`) to [M, F]."""
    if not gated:
        return ACTIVATIONS[activation](inner)
    gate, up = inner.chunk(2, -1)
    if activation == CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return ACTIVATIONS[activation](gate) * up


def dispatch(
    x: Tensor, weights: Tensor, indices: Tensor, num_experts: int, outputs: int, mlp: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sorts tokens by expert, calls `mlp(expert, its rows)` for experts that have some, and sums what comes back.

    Choices with the index -1 are left out.

    Raises:
        ValueError: an index is no expert.
    """
    chosen = indices.flatten()
    ids, order = chosen.sort(stable=True)
    if len(ids) and not -1 <= int(ids[0]) <= int(ids[-1]) < num_experts:
        raise ValueError(f"Experts {int(ids[0])} … {int(ids[-1])} are asked for, but there are {num_experts}")
    dropped = int((ids < 0).sum())
    ids, order = ids[dropped:], order[dropped:]
    shares, result = weights.flatten().float(), x.new_zeros(x.shape[0], outputs, dtype=torch.float32)
    active, counts = ids.unique_consecutive(return_counts=True)
    for expert, places in zip(active.tolist(), order.split(counts.tolist()), strict=True):
        rows = places // indices.shape[-1]
        result.index_add_(0, rows, mlp(expert, x[rows]).float() * shares[places, None])
    return result.to(x.dtype)


@experts.fake
def _fake(x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, up_bias: object, down: Tensor, *_rest, **_more):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], down.shape[1])


@experts.cost
def _cost(
    x: TensorInfo, weights: TensorInfo, indices: TensorInfo, up: TensorInfo, _bias: object, down: TensorInfo,
    *_rest: object, **_more: object,
) -> Cost:  # fmt: skip
    per_row = up.shape[1] * up.shape[2] + down.shape[1] * down.shape[2]
    return Cost(flops=2 * indices.numel * per_row)


@experts.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype) * 0.3

    for tokens, top_k in ((1, 2), (9, 1), (5, 3)):
        indices = torch.rand(tokens, 6).argsort(-1)[:, :top_k]
        routed = (numbers(tokens, 20), torch.rand(tokens, top_k), indices)
        note = f"{tokens} tokens, top {top_k}"
        yield Sample((*routed, numbers(6, 48, 20), None, numbers(6, 20, 24), None, "silu"), note=note)
        biased = (numbers(6, 48, 20), numbers(6, 48), numbers(6, 20, 24), numbers(6, 20))
        yield Sample((*routed, *biased, CLAMPED_SWIGLU, True, 1.702, 7.0), note=f"{note}, clamped, biases")
        plain = (numbers(6, 24, 20), None, numbers(6, 20, 24), None)
        yield Sample((*routed, *plain, "relu", False), note=f"{note}, no gate")
        some = indices.masked_fill(torch.arange(tokens)[:, None] % 2 == 1, -1)
        yield Sample((*routed[:2], some, *plain, "relu", False), note=f"{note}, dropped choices")
