"""LLM.int8(): channels whose activations are outliers stay in floating point, and the rest is multiplied in 8 bits.

    before                 after
    y = linear(x, W, b)    y = quantized_linear(quantize_dequantize(x * inliers), codes, …, b)
                               + linear(x[outliers], W[:, outliers])

A channel is an outlier if a calibration token exceeds the threshold in it, so that the choice is fixed in the graph.
Weights have one scale per row and activations one per token. The weights of experts have 8 bits too, and their
activations stay in floating point, where outliers do no harm; routers stay as they are.
"""

from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import calibration, rounding, structure
from graphwright.calibration import Channels, Stop
from graphwright.expert_quantizer import ExpertLayer, expert_layers, install_experts, solve_experts
from graphwright.ops import moe_routing, quantize_dequantize, quantized_linear
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.scheme import Scheme

aten = torch.ops.aten

SCHEME = Scheme(format="int8", group_size=0, symmetric=True, scale_dtype="float32")


class LlmInt8(Pass):
    """8-bit products with outlier channels in floating point."""

    name = "llm_int8"
    kind = "approximate"
    paper = Paper(
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "Dettmers et al.", 2022, "2208.07339"
    )
    requires = ("linear",)
    after = (
        "merged_linear",
        "float_dtype",
        "folded",
        "experts",
        "fewer_experts",
        "narrower_experts",
        "shared_experts_fused",
    )
    provides = ("quantized", "quantized_activations")
    conflicts = ("quantized", "quantized_activations")

    threshold: float = Field(6.0, gt=0, description="magnitude from which on an activation is an outlier")

    @property
    def calibrates(self) -> bool:
        """Always."""
        return True

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """All but the outlier channels."""
        return ("int8",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Splits every linear layer that reads a norm's or another layer's activations.

        Raises:
            PassError: there is nothing to calibrate on, or a weight or activation is not finite.
        """
        layers: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
        for node, weight in structure.linears(program):
            if not any(user.target is moe_routing.target for user in node.users):
                layers.setdefault(node.args[0], []).append((node, weight))
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        sources = sorted(layers, key=order.__getitem__)
        stops = [Stop(source, f"{self.name} {layers[source][0][1].target}") for source in sources]
        found = calibration.measure(
            self, program, context, stops, Channels, lambda _index, collected: {"largest": collected.largest}
        )
        outliers = {
            source: (one["largest"] >= self.threshold).nonzero().flatten()
            for source, one in zip(sources, found, strict=True)
        }
        split = _Split(Editor(program, self.name, context.fuel))
        with split.editor:
            for source in sources:
                for node, weight in layers[source]:
                    if split.editor.allow(node):
                        split.layer(node, weight, outliers[source])
            for mixture in expert_layers(program, lambda _name: SCHEME):
                if split.editor.allow(mixture.node):
                    split.experts(mixture, context)
        kept = {str(layers[source][0][1].target): len(found) for source, found in outliers.items()}
        return PassResult(program, split.editor.sites, notes={"outliers": kept}, layer_errors=split.errors)


@dataclass
class _Split:
    """The edit in progress; layers that read one tensor share its rounding."""

    editor: Editor
    errors: dict[str, float] = field(default_factory=dict)
    _rounded: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def layer(self, node: fx.Node, weight: fx.Node, outliers: Tensor) -> None:
        """Splits one layer."""
        call, name = self.editor.call, str(weight.target)
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        dense = self.editor.program.weight(weight)
        inner = dense.clone()
        inner[:, outliers] = 0
        done = rounding.quantize(inner, SCHEME)
        self.errors[name] = rounding.relative_weight_error(inner, done)
        codes = self.editor.weight(f"{name}_int8", done.packed, node)
        scale = self.editor.weight(f"{name}_scale", done.grid.scale, node)
        bias = node.args[2] if len(node.args) > 2 else None
        rounded = self._inliers(source, outliers, node)
        new = call(quantized_linear, rounded, codes, scale, None, bias, "int8", done.group_size, before=node)
        if len(outliers):
            index = self.editor.weight(f"{name}_outliers", outliers, node)
            kept = self.editor.weight(f"{name}_outlier_columns", dense[:, outliers].contiguous(), node)
            chosen = call(aten.index_select.default, source, source.meta["val"].dim() - 1, index, before=node)
            new = call(aten.add.Tensor, new, call(aten.linear.default, chosen, kept, before=node), before=node)
        self.editor.replace(node, new, f"{name}: {len(outliers)} outliers")

    def experts(self, mixture: ExpertLayer, context: Context) -> None:
        """Rounds the weights of a layer of experts."""
        solved = solve_experts(
            self.editor.program,
            mixture,
            lambda weight, scheme, _statistics: rounding.quantize(weight, scheme),
            lambda weight, done, _statistics: rounding.relative_weight_error(weight, done),
            lambda text: context.progress(f"llm_int8 {text}", 1.0),
        )
        self.errors.update(install_experts(self.editor, mixture, solved))

    def _inliers(self, source: fx.Node, outliers: Tensor, before: fx.Node) -> fx.Node:
        """The rounded activations without outliers, which would widen the scale of every token."""
        if source not in self._rounded:
            inner = source
            if len(outliers):
                value = source.meta["val"]
                inliers = torch.ones(value.shape[-1], dtype=value.dtype)
                inliers[outliers] = 0
                mask = self.editor.weight(f"{source.name}_inliers", inliers, before)
                inner = self.editor.call(aten.mul.Tensor, source, mask, before=before)
            self._rounded[source] = self.editor.call(quantize_dequantize, inner, None, "int8", 0, before=before)
        return self._rounded[source]
