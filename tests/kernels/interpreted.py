"""Runs kernels in Triton's interpreter, in every configuration that a launch offers."""

import torch

from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import JustInTime

DEVICE = DEVICES["cuda:sm_90"]


def runner(number: int = 0) -> JustInTime:
    """A runner that takes the launch's configuration `number`, counted round."""
    return JustInTime(DEVICE, lambda launch, device: launch.configs[number % len(launch.configs)])


TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error relative to the row's root mean square, by dtype: a few roundings of the result."""
