"""What a pass is: options as typed fields, a declared kind, what it requires and provides, and one method.

    class Rtn(Pass):
        '''Round-to-nearest weight quantization.'''

        name = "rtn"
        kind = "approximate"
        requires = ("raised",)
        provides = ("quantized",)

        bits: Literal[4, 8] = Field(4, description="bits per weight")

        def run(self, program, context): ...

A pass file in `graphwright.passes` is found by its name; nothing else has to be edited.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from graphwright.program import Program
from graphwright.rewrite import Fuel, Site
from graphwright.target import Target

Kind = Literal["exact", "approximate", "structural"]


@dataclass(frozen=True)
class Paper:
    """Where a technique comes from."""

    title: str
    authors: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        number = f", arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.authors} {self.year}, {self.title}{number}"


@dataclass
class PassResult:
    """What a pass did. `program` may be the one that came in, edited, or another."""

    program: Program
    sites: list[Site] = field(default_factory=list)
    near_misses: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)
    """Approximate passes: relative error per layer, by weight name."""


@dataclass
class Context:
    """What a pass may ask for while it runs."""

    target: Target
    seed: int = 0
    fuel: Fuel = field(default_factory=Fuel)
    calibration: list[dict[str, Tensor]] = field(default_factory=list)
    checkpoint: Path | None = None
    """Folder in which calibrated passes keep finished layers, so that an interrupted run goes on; None for none."""
    progress: Callable[[str, float], None] = lambda _text, _fraction: None

    def generator(self) -> torch.Generator:
        """A fresh random generator from the seed."""
        return torch.Generator().manual_seed(self.seed)


class Pass(BaseModel):
    """Base of all passes. Fields are options; class variables say what the pass is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    kind: ClassVar[Kind]
    paper: ClassVar[Paper | None] = None
    requires: ClassVar[tuple[str, ...]] = ()
    """Properties of the program that must hold; a pass that provides each runs earlier."""
    after: ClassVar[tuple[str, ...]] = ()
    """Properties that, if any pass of the recipe provides them, must be provided earlier."""
    provides: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Properties that must not hold."""
    replaces_weights: ClassVar[bool] = False
    """The pass retires large weights one after the other. Where memory counts, it is compared with outputs that are
    computed ahead, so that nothing holds the old weights; a mistake is then found without its node."""
    reads_codes: ClassVar[bool] = False
    """The model is to be read with the codes that its checkpoint holds, where it is quantized already."""

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites `program` in place, or returns another."""
        raise NotImplementedError(f"pass {self.name} defines no run method")

    @property
    def calibrates(self) -> bool:
        """Whether the pass, with these options, measures activations and so wants calibration inputs."""
        return False

    @property
    def streamed(self) -> int:
        """How many drawn tokens measure the error of a pass over caches, where there is no calibration text.

        Text is then fed in chunks, because a single forward does not read what caches hold. 0 for one whole forward.
        """
        return 0

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Formats of `graphwright.packing` in which the pass, with these options, may store weights."""
        return ()

    def leftover(self, program: Program) -> str | None:
        """What contradicts `provides` in the finished program, or None; checked by the manager."""
        return None

    def verify(self, before: Program, after: Program, context: Context) -> float | None:
        """Largest relative error of `after` against `before`, for a pass that changes the contract.

        None leaves the check to the manager, which compares both programs on the same drawn inputs.
        """
        return None

    def spec(self) -> str:
        """The pass and the options that differ from their defaults: `rtn{bits=8}`."""
        options = self.model_dump(exclude_defaults=True)
        inside = ",".join(f"{key}={value}" for key, value in options.items())
        return f"{self.name}{{{inside}}}" if inside else self.name
