"""What torch_tensorrt asks PyTorch about the GPU at hand, answered for the target where there is no GPU.

    with questions_answered("sm_89"):
        import torch_tensorrt                    # and whatever makes its settings

torch_tensorrt 2.13 asks for a compute capability when it is imported, to tell Jetson boards from others, and for the
number of the current GPU whenever settings are made. Neither reaches an engine of TensorRT for RTX, which is built for
the compute capability that its builder is told. A version that imports without a GPU needs none of this.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def questions_answered(arch: str) -> Iterator[None]:
    """Answers as GPU 0 of an architecture such as `sm_89` would, until the block ends; where there is a GPU, it does.

    Args:
        arch: the compute capability to build for; the last digit is the minor one.
    """
    if torch.cuda.is_available():
        yield
        return
    digits = arch.removeprefix("sm_")
    capability = (int(digits[:-1]), int(digits[-1]))
    before = torch.cuda.get_device_capability, torch.cuda.current_device
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.current_device = lambda: 0
    try:
        yield
    finally:
        torch.cuda.get_device_capability, torch.cuda.current_device = before


__all__ = ["questions_answered"]
