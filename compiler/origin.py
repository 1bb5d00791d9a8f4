"""What exporters ask about the model that a program came from, beyond what the program says.

Collected before the model is let go of, since its weights are freed as they are rewritten.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graphwright.checkpoints.packed import PackedLinear
from graphwright.program import Program
from graphwright.sources import Source


@dataclass(frozen=True)
class Origin:
    """The model behind a program.

    Attributes:
        tokenizer: a directory with the tokenizer's files, or None.
        config: the configuration of a Hugging Face model, or None.
        generation_config: its defaults for generation, or None.
        parameters: the names of each parameter; a tied one has several.
        linears: names of the linear layers.
        constants: names of weights that the captured program reads and that are no parameters.
    """

    tokenizer: Path | None = None
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    parameters: tuple[tuple[str, ...], ...] = ()
    linears: tuple[str, ...] = ()
    constants: frozenset[str] = frozenset()

    @staticmethod
    def of(source: Source, captured: Program) -> "Origin":
        """Of a source whose model was captured."""
        model = source.model
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        known = {name for group in names.values() for name in group}
        return Origin(
            tokenizer=Path(source.tokenizer_directory) if source.tokenizer_directory else None,
            config=_config(model),
            generation_config=_plain(getattr(model, "generation_config", None)),
            parameters=tuple(tuple(group) for group in names.values()),
            linears=tuple(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, PackedLinear))),
            constants=frozenset(set(captured.weights()) - known),
        )


def _config(model: nn.Module) -> dict[str, Any] | None:
    config = _plain(getattr(model, "config", None))
    # A model that was built from its class alone does not know what it is called.
    return None if config is None else {**config, "architectures": [type(model).__name__]}


def _plain(config: Any) -> dict[str, Any] | None:
    return config.to_dict() if hasattr(config, "to_dict") else None
