"""Quantization of activations: what quantized layers read is rounded to low-bit codes.

    before                              after
    y = quantized_linear(x, codes, …)   y = quantized_linear(quantize_dequantize(x), codes, …)

Dynamic: the scale is max|x| / largest code of each token, or of each group of a token's channels, at run time
(ZeroQuant's token-wise scheme), so nothing is calibrated. Static: one scale per tensor, from the largest magnitude that
calibration meets behind the quantized weights. With codes on both sides a backend multiplies them. Layers that read
the same x share one rounding.
"""

import re
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, fx

from graphwright import calibration, structure
from graphwright.calibration import Channels, Stop
from graphwright.errors import PassError
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.ops.quantize_dequantize import LARGEST
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor


class Activations(Pass):
    """Rounding of what quantized layers read."""

    name = "activations"
    kind = "approximate"
    paper = Paper(
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        "Yao et al.",
        2022,
        "2206.01861",
    )
    requires = ("quantized",)
    provides = ("quantized_activations",)
    conflicts = ("quantized_activations",)

    format: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2"] = Field("int8", description="codes of the activations")
    head: bool = Field(True, description="round the input of the vocabulary head too")
    group_size: int = Field(0, ge=0, description="channels that share a scale; 0: all of a token")
    static: bool = Field(False, description="one scale per tensor, from calibration, instead of one per token")
    skip: tuple[str, ...] = Field((), description="layers that read their input as it is: patterns of names of weights")

    @field_validator("skip")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @property
    def calibrates(self) -> bool:
        """For static scales."""
        return self.static

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds the input of every quantized linear layer.

        Raises:
            PassError: the group size does not divide a layer's width, a pattern names no layer, or static scales have
                nothing to be measured on.
        """
        layers = self._layers(program)
        peaks = self._peaks(program, context, list(layers)) if self.static else {}
        with Editor(program, self.name, context.fuel) as editor:
            for source, nodes in layers.items():
                rounded: fx.Node | None = None
                for node in nodes:
                    if not editor.allow(node):
                        continue
                    if rounded is None:
                        rounded = self._round(editor, source, peaks.get(source), node)
                    new = editor.call(quantized_linear, rounded, *node.args[1:], before=node)
                    editor.replace(node, new, str(node.args[1]))
        return PassResult(program, editor.sites)

    def _layers(self, program: Program) -> dict[fx.Node, list[fx.Node]]:
        """The layers whose input is rounded, by that input."""
        head, unmatched = structure.head(program), set(self.skip)
        layers: dict[fx.Node, list[fx.Node]] = {}
        for node in program.calls(quantized_linear.target):
            source = node.args[0]
            matched = {pattern for pattern in self.skip if re.search(pattern, str(node.args[1]))}
            unmatched -= matched
            if isinstance(source, fx.Node) and not matched and (node is not head or self.head):
                self._check(node, source)
                layers.setdefault(source, []).append(node)
        if unmatched:
            raise PassError(
                f"No layer's weight matches {', '.join(sorted(unmatched))}", where=f"option skip of pass {self.name}"
            )
        return layers

    def _round(self, editor: Editor, source: fx.Node, peak: Tensor | None, before: fx.Node) -> fx.Node:
        scale = None
        if peak is not None:
            scale = editor.weight(f"{source.name}_scale", peak / LARGEST[self.format], before)
        group_size = 0 if self.static else self.group_size
        return editor.call(quantize_dequantize, source, scale, self.format, group_size, before=before)

    def _peaks(self, program: Program, context: Context, sources: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """The largest magnitude of each tensor, [], over the calibration data."""
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        ordered = sorted(sources, key=order.__getitem__)
        smallest = torch.finfo(torch.float32).tiny
        stops = [Stop(node, f"{self.name} {node.name}") for node in ordered]
        found = calibration.measure(
            self,
            program,
            context,
            stops,
            Channels,
            lambda _index, collected: {"peak": collected.largest.amax().clamp_min(smallest)},
        )
        return {node: one["peak"] for node, one in zip(ordered, found, strict=True)}

    def _check(self, node: fx.Node, source: fx.Node) -> None:
        width = int(source.meta["val"].shape[-1])
        if self.group_size and width % self.group_size:
            raise PassError(
                f"Groups of {self.group_size} do not divide the {width} channels that a layer reads",
                where=str(node.args[1]),
                fix="Choose a group size that divides every layer's width, or 0",
            )
