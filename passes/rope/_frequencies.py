"""What the methods of scaling rotary embeddings share: new frequencies in every rope, and a longer context.

Rotations of attention with a sliding window stay: it sees no distances that it was not trained for.

    before                                            after
    y = rope(x, positions, inv_freq)                  y = rope(x, positions, inv_freq_scaled, scaling)
    context_length 2048                               context_length 8192
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import shapes
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import attention, rope
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor, describe


class RopeScaling(Pass):
    """Base: subclasses say what becomes of the frequencies."""

    kind = "approximate"
    requires = ("rope",)
    provides = ("scaled_rope",)
    conflicts: ClassVar[tuple[str, ...]] = ("scaled_rope",)

    factor: float = Field(ge=1, allow_inf_nan=False, description="how much longer the context becomes")

    def scaled(self, inv_freq: Tensor, context_length: int) -> Tensor:
        """New frequencies [R/2], float32, of a model that was trained with `context_length`."""
        raise NotImplementedError(f"pass {self.name} defines no frequencies")

    @property
    def temperature(self) -> float:
        """What cosine and sine are multiplied by."""
        return 1.0

    def run(self, program: Program, context: Context) -> PassResult:
        """Changes every rope, and the length that the program takes.

        Raises:
            PassError: there is no rope, it is scaled already, caches have been inserted, or the length of the model's
                context is not known.
        """
        ropes = [node for node in program.calls(rope.target) if not _windowed(node)]
        self._refuse(program, ropes)
        old = program.metadata.context_length
        made: dict[Any, Any] = {}
        with Editor(program, self.name, context.fuel) as editor:
            for node in ropes:
                if not editor.allow(node):
                    break
                name = str(argument(node, "inv_freq").target)
                rest = (self.temperature, argument(node, "interleaved"))
                frequencies = self.frequencies(editor, node, old, made)
                new = editor.call(rope, node.args[0], argument(node, "positions"), frequencies, *rest, before=node)
                editor.replace(node, new, name)
        longer = _lengthened(program, int(old * self.factor))
        return PassResult(longer, editor.sites, notes={"context_length": [old, int(old * self.factor)]})

    def frequencies(self, editor: Editor, node: fx.Node, context_length: int, made: dict[Any, Any]) -> fx.Node:
        """The new frequencies of the rope `node`, in the graph just before it; `made` is shared by all ropes."""
        name = str(argument(node, "inv_freq").target)
        if name not in made:
            wide = self.scaled(editor.program.weight(name).float(), context_length)
            made[name] = str(editor.weight(f"{name}_scaled", wide, before=node).target)
        return editor.read(made[name], before=node)

    def _refuse(self, program: Program, ropes: list[fx.Node]) -> None:
        if not ropes:
            raise PassError(
                f"Pass {self.name} scales rotary position embeddings whose attention sees the whole context, and the "
                "program has none",
                fix="Leave the pass out: positions are learned, come from ALiBi, or attention has a sliding window",
            )
        if program.contract.state:
            raise PassError(
                f"Pass {self.name} comes before caches, whose length follows from the context's",
                fix="Compile the original model with a recipe that holds both passes",
            )
        if not program.metadata.context_length:
            raise PassError(f"Pass {self.name} must know the context that the model was trained for, and it does not")
        for node in ropes:
            if argument(node, "inv_freq").op != "get_attr":
                raise PassError("The frequencies of a rope are computed, not stored", where=describe(node))
            if argument(node, "scaling") != 1.0:
                raise PassError(
                    "The model's rotary embedding is scaled already", where=describe(node), fix="Leave the pass out"
                )


def _windowed(node: fx.Node) -> bool:
    """Whether only attention within a sliding window reads the result: no distance there is new to the model."""
    return all(user.target is attention.target and argument(user, "window") for user in node.users)


def _lengthened(program: Program, length: int) -> Program:
    """The program for sequences of up to `length` tokens."""
    contract, old = program.contract, program.metadata.context_length
    dims = tuple(replace(dim, max=length) if dim.name == "sequence" else dim for dim in contract.dims)
    inputs = tuple(
        replace(spec, high=length) if spec.role == "position" and spec.high == old else spec for spec in contract.inputs
    )
    longer = Program(
        program.module,
        contract.with_(dims=dims, inputs=inputs),
        program.metadata.with_(context_length=length),
        program.history,
    )
    shapes.propagate(longer.module, longer.contract)
    return longer


def rotary_base(inv_freq: Tensor) -> float:
    """The base of frequencies base^(-2i/d).

    Raises:
        PassError: they are no such series, as of a model whose frequencies were changed before.
    """
    half = inv_freq.shape[0]
    base = float(inv_freq[-1].double() ** (-half / (half - 1))) if half > 1 else 0.0
    expected = base ** -(torch.arange(half, dtype=torch.float64) / half) if base > 1 else inv_freq.double() * 0
    if not torch.allclose(inv_freq.double(), expected, rtol=1e-4):
        raise PassError(
            "The frequencies are not powers of one base: the model's rotary embedding is scaled already",
            fix="Leave the pass out, or use position_interpolation, which takes any frequencies",
        )
    return base
