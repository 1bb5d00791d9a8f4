"""What exporters ask about the model that a program came from, beyond what the program says.

Collected before the model is let go of, since its weights are freed as they are rewritten.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from graphwright.interchange.packed import PackedLinear
from graphwright.program import Program


@dataclass(frozen=True)
class Origin:
    """The parts of the model behind a program.

    Attributes:
        class_name: of the model.
        generation_config: its defaults for generation, or None.
        parameters: the names of each parameter; a tied one has several.
        linears: names of the linear layers.
        constants: names of weights that the captured program reads and that are no parameters.
    """

    class_name: str = ""
    generation_config: dict[str, Any] | None = None
    parameters: tuple[tuple[str, ...], ...] = ()
    linears: tuple[str, ...] = ()
    constants: frozenset[str] = frozenset()

    @staticmethod
    def of(model: nn.Module, captured: Program) -> "Origin":
        """Of a model that was captured."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        known = {name for group in names.values() for name in group}
        generation = getattr(model, "generation_config", None)
        return Origin(
            class_name=type(model).__name__,
            generation_config=generation.to_dict() if hasattr(generation, "to_dict") else None,
            parameters=tuple(tuple(group) for group in names.values()),
            linears=tuple(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, PackedLinear))),
            constants=frozenset(set(captured.weights()) - known),
        )
