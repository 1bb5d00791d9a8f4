"""Quantization of activations: what quantized layers read is rounded to low-bit codes.

    before                              after
    y = quantized_linear(x, codes, …)   y = quantized_linear(quantize_dequantize(x), codes, …)

Dynamic: the scale is max|x| / largest code of each token, or of each group of a token's channels, at run time
(ZeroQuant's token-wise scheme), so nothing is calibrated. Static: one scale per tensor, from the magnitudes that
calibration meets behind the quantized weights; `observer` says which of them it represents. With codes on both sides a
backend multiplies them. Layers that read the same x share one rounding.

Where a few tokens are hundreds of times larger than the others, as the first token is for the down projection of some
layers in most language models, no scale serves both: reaching the large ones rounds all others to zero, and clipping
them breaks what they are for. `dynamic_above` gives such inputs a scale per token, and smoothing
(`graphwright.passes.quantize.smoothquant`) makes them rare.
"""

import re
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, fx

from graphwright import calibration, structure
from graphwright.calibration import Stop
from graphwright.errors import PassError
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.ops.quantize_dequantize import LARGEST
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.ranges import Magnitudes, Observer, represented
from graphwright.rewrite import Editor

CALIBRATED = ("observer", "percentile", "dynamic_above")
"""Options of static scales."""


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
    observer: Observer = Field("mse", description="static: the magnitudes that a scale represents")
    percentile: float = Field(
        99.99, gt=50, le=100, description="observer percentile: the part of values that is not clipped"
    )
    dynamic_above: float = Field(
        0, ge=0, description="static: inputs whose largest token is so many times a median one keep scales per token"
    )
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

    @model_validator(mode="after")
    def _calibrated(self) -> "Activations":
        given = [name for name in CALIBRATED if name in self.model_fields_set]
        if given and not self.static:
            raise ValueError(f"{' and '.join(given)} would have no effect: only static scales are calibrated")
        if "percentile" in given and self.observer != "percentile":
            raise ValueError(f"percentile would have no effect: the observer is {self.observer}")
        return self

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
        scales = self._scales(program, context, list(layers)) if self.static else {}
        with Editor(program, self.name, context.fuel) as editor:
            for source, nodes in layers.items():
                rounded: fx.Node | None = None
                for node in nodes:
                    if not editor.allow(node):
                        continue
                    if rounded is None:
                        rounded = self._round(editor, source, scales.get(source), node)
                    new = editor.call(quantized_linear, rounded, *node.args[1:], before=node)
                    editor.replace(node, new, str(node.args[1]))
        dynamic = [str(nodes[0].args[1]) for source, nodes in layers.items() if self.static and source not in scales]
        return PassResult(program, editor.sites, notes={"scales per token": dynamic} if dynamic else {})

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

    def _round(self, editor: Editor, source: fx.Node, scale: Tensor | None, before: fx.Node) -> fx.Node:
        stored = None if scale is None else editor.weight(f"{source.name}_scale", scale, before)
        group_size = 0 if self.static else self.group_size
        return editor.call(quantize_dequantize, source, stored, self.format, group_size, before=before)

    def _scales(self, program: Program, context: Context, sources: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """The scale [] of each tensor that has a static one, from the calibration data."""
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        ordered = sorted(sources, key=order.__getitem__)
        stops = [Stop(node, f"{self.name} {node.name}") for node in ordered]
        found = calibration.measure(self, program, context, stops, Magnitudes, lambda _index, seen: self._range(seen))
        return {node: one["scale"] for node, one in zip(ordered, found, strict=True) if "scale" in one}

    def _range(self, seen: Magnitudes) -> dict[str, Tensor]:
        """How different tokens are, and the scale where they are not too different for one."""
        spread = {"spread": torch.tensor(seen.spread)}
        if self.dynamic_above and seen.spread > self.dynamic_above:
            return spread
        largest = represented(seen, self.observer, self.percentile, self.format)
        return {**spread, "scale": largest.clamp_min(torch.finfo(torch.float32).tiny) / LARGEST[self.format]}

    def _check(self, node: fx.Node, source: fx.Node) -> None:
        width = int(source.meta["val"].shape[-1])
        if self.group_size and width % self.group_size:
            raise PassError(
                f"Groups of {self.group_size} do not divide the {width} channels that a layer reads",
                where=str(node.args[1]),
                fix="Choose a group size that divides every layer's width, or 0",
            )
