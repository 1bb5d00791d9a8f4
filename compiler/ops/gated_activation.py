"""The elementwise middle of a gated MLP (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from graphwright.op import Cost, Sample, TensorInfo, op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
"""Activations by the name that the op's `activation` argument takes."""


@op
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up.

    Args:
        gate: any shape.
        up: the shape of `gate`.
        activation: `silu`, `gelu`, `gelu_tanh` or `relu`.
    """
    return ACTIVATIONS[activation](gate) * up


@gated_activation.fake
def _fake(gate: Tensor, *_rest: object, **_more: object) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@gated_activation.cost
def _cost(gate: TensorInfo, *_rest: object, **_more: object) -> Cost:
    return Cost(flops=6 * gate.numel)


@gated_activation.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for activation in ACTIVATIONS:
        for shape in ((2, 3, 96), (1, 1, 1536), (5, 17)):
            gate, up = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            yield Sample((gate, up, activation), note=f"{activation} {shape}")
