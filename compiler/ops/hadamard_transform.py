"""The Walsh-Hadamard transform of activations, which spreads an outlier over all channels.

Ashkboos et al. 2024, QuaRot, arXiv:2404.00456.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.op import Cost, Sample, TensorInfo, op


@op
def hadamard_transform(x: Tensor, block_size: int) -> Tensor:
    """Each block of channels times the symmetric, orthogonal Hadamard matrix; its own inverse.

    Args:
        x: [..., K], floating point, K a multiple of `block_size`.
        block_size: a power of two.

    Returns:
        The shape and dtype of `x`.
    """
    turned = x.float()
    width = 1
    while width < block_size:
        pairs = turned.unflatten(-1, (-1, 2, width))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return (turned / block_size**0.5).to(x.dtype)


@hadamard_transform.fake
def _fake(x: Tensor, block_size: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@hadamard_transform.cost
def _cost(x: TensorInfo, block_size: int) -> Cost:
    return Cost(flops=x.numel * (block_size.bit_length() - 1))


@hadamard_transform.samples
def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for shape, block_size in (((2, 3, 8), 8), ((1, 1, 1536), 512), ((5, 12), 4)):
        yield Sample((torch.randn(shape, dtype=dtype), block_size), note=f"{shape} in blocks of {block_size}")
