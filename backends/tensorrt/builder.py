"""What builds engines: torch_tensorrt where it is installed, else TensorRT's ONNX parser; and what both have in common.

builder = find(target)                              # says what is missing
model, refusals = builder.prepare(part, folder)     # {node: reason}; empty if TensorRT takes the whole part
engine = builder.build(model, part, profiles, "sm_89", progress)
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import fx

from graphwright.backend import Progress, Support
from graphwright.backends.tensorrt.engine import Engine, Sizes
from graphwright.errors import BackendError
from graphwright.partition import Part
from graphwright.target import Target


class Builder(Protocol):
    """A way from a part of a program to its engine."""

    name: str
    """What it is, with its version."""

    def supports(self, node: fx.Node) -> Support:
        """Whether a node may have a form in an engine, as far as the node alone shows."""
        ...

    def prepare(self, part: Part, folder: Path) -> tuple[Any, dict[str, str]]:
        """What `build` builds from, and the nodes of the part that stand in the way, each with the reason.

        Args:
            part: nodes that `supports` has let through.
            folder: an existing one of the part's own, for files that the model needs.

        Raises:
            BackendError: something stands in the way that is no node of the part.
        """
        ...

    def build(
        self, model: Any, part: Part, profiles: Sequence[dict[str, Sizes]], arch: str, progress: Progress
    ) -> Engine:
        """The engine of what `prepare` made of a part.

        Raises:
            BackendError: TensorRT does not build it; its own words are given.
        """
        ...


def require(target: Target | None = None) -> None:
    """Refuses to go on where no builder can work, without importing any.

    Args:
        target: what to build for, None where it is not known yet.

    Raises:
        BackendError: a package is missing, or the one that is there does not build for the target; says what to do.
    """
    if has_torch_tensorrt():
        from graphwright.backends.tensorrt.torch_builder import require_target

        require_target(target)
        return
    for name in ("tensorrt_rtx", "onnx", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            raise BackendError(
                f"The tensorrt backend needs the package {name.replace('_', '-')}",
                fix="pip install 'graphwright[tensorrt]'",
            )


def find(target: Target) -> Builder:
    """The builder for a target on this machine.

    Raises:
        BackendError: a package is missing or cannot be imported, or does not build for the target.
    """
    require(target)
    if has_torch_tensorrt():
        from graphwright.backends.tensorrt.torch_builder import TorchBuilder

        return TorchBuilder(target)
    from graphwright.backends.tensorrt.onnx_builder import OnnxBuilder

    return OnnxBuilder()


def has_torch_tensorrt() -> bool:
    """Whether torch_tensorrt is installed, and so builds the engines."""
    return importlib.util.find_spec("torch_tensorrt") is not None


def some(reasons: Mapping[str, str], most: int = 8) -> str:
    """The first reasons in one line."""
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:most])
    return shown + (f"; and {len(reasons) - most} more" if len(reasons) > most else "")
