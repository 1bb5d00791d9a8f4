"""torch's tracer, imported without Triton where torch could not launch a Triton kernel anyway."""

import importlib
import sys

import torch

TRACER = "torch.export._trace"
"""What `torch.export` runs on; it imports `torch._dynamo` and parts of Inductor, and these import Triton."""


def import_tracer() -> None:
    """Imports what `torch.export` needs; a build of torch for the CPU does so as if Triton were not installed.

    Triton's library maps up to 200 MB, a sixth of what a compile of a small model takes. Our own Triton backend
    compiles for other machines without torch's help, and imports the package when it does.
    """
    without_gpu = torch.version.cuda is None and torch.version.hip is None
    if TRACER in sys.modules or "triton" in sys.modules or not without_gpu:
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        importlib.import_module(TRACER)
    finally:
        del sys.modules["triton"]
