"""A value in a buffer of its own.

Inductor inlines cheap producers into every consumer. In front of a reduction over weights that means computing an
activation again for every output, so the lowerings say where a buffer is wanted. A strided view of a contiguous
tensor is an operation that Inductor can only do on a buffer.
"""

import torch
from torch import Tensor


def realize(x: Tensor) -> Tensor:
    """`x`, contiguous and stored."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return torch.as_strided(x.contiguous(), x.shape, strides if x.dim() else [])
