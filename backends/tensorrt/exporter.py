"""The format `tensorrt`: engines for one GPU, what they leave to PyTorch, and the plan that joins them.

graphwright export MODEL --format tensorrt --recipe int4 --option arch=sm_89 -o DIR

It is an artifact as `graphwright compile --target tensorrt:sm_89` makes it; `graphwright.load` runs it on that GPU.
"""

from typing import Any, Literal

from pydantic import Field

from graphwright.backends.tensorrt import builder
from graphwright.backends.tensorrt.executable import require_gpu
from graphwright.export_format import FormatOptions
from graphwright.lowered_format import LoweredFormat
from graphwright.target import Target


class TensorrtOptions(FormatOptions):
    """Options of the format `tensorrt`."""

    arch: Literal["sm_80", "sm_89", "sm_120"] = Field("sm_89", description="compute capability of the GPU")


class Tensorrt(LoweredFormat):
    """Compiles with the backend `tensorrt`."""

    name = "tensorrt"
    lowering = "tensorrt"
    options = TensorrtOptions

    def target(self, options: Any) -> Target:
        """The GPU that the option names."""
        return Target.parse(f"tensorrt:{options.arch}")

    def require(self, options: Any, *, verify: bool) -> None:
        """Refuses a machine without the packages, and verification without the GPU.

        Raises:
            BackendError: a package is missing.
            TargetError: what is installed builds for another GPU, or engines are to run on another than their own.
        """
        builder.require(self.target(options))
        if verify:
            require_gpu(self.target(options))


FORMAT = Tensorrt()
