"""ATen operators without a kernel of their own, by TVM's converters for single operators."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from graphwright.errors import BackendError
from graphwright.rewrite import describe


class Leftovers:
    """Converts one node at a time into the function that `builder` is at."""

    def __init__(self, builder: relax.BlockBuilder, value_of: Callable[[fx.Node], Any]) -> None:
        self._importer = ExportedProgramImporter()
        self._importer.block_builder = builder
        self._importer.env = _Values(value_of)
        self._importer.update_convert_map({"clamp.default": self._clamp})

    def convert(self, node: fx.Node) -> relax.Expr:
        """The value of a node.

        Raises:
            BackendError: TVM has no converter, or it refuses this use.
        """
        name = converter_name(node)
        if name not in known():
            raise BackendError(f"TVM has no converter for {name}", where=describe(node), fix="Use backend='inductor'")
        try:
            return self._importer.convert_map[name](node)
        except Exception as error:
            raise BackendError(
                f"TVM cannot convert {name}: {type(error).__name__}: {error}",
                where=describe(node),
                fix="Use backend='inductor'",
            ) from error

    def _clamp(self, node: fx.Node) -> relax.Expr:
        """TVM's own converter takes infinity for a bound that is absent, which integers do not have."""
        x, low, high = (*node.args, None, None)[:3]
        result = self._importer.env[x]
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        if low is not None:
            result = relax.op.maximum(result, relax.const(low, dtype))
        if high is not None:
            result = relax.op.minimum(result, relax.const(high, dtype))
        return self._importer.block_builder.emit(result)


class _Values(dict[fx.Node, Any]):
    """The values that converters look up, made when they are asked for."""

    def __init__(self, value_of: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self._value_of = value_of

    def __missing__(self, node: fx.Node) -> Any:
        return self._value_of(node)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node)


def converter_name(node: fx.Node) -> str:
    """What TVM's table of converters calls the target of a node."""
    target: Any = node.target
    return str(target.__name__) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")


@functools.cache
def known() -> frozenset[str]:
    """Names of all converters."""
    return frozenset(name for name in ExportedProgramImporter().convert_map if isinstance(name, str))
