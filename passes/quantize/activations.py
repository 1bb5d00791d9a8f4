"""Dynamic quantization of activations: each token's inputs of quantized layers are rounded to 8-bit codes.

    before                              after
    y = quantized_linear(x, codes, …)   y = quantized_linear(quantize_dequantize(x), codes, …)

The scale is max|x| / 127 of each token at run time (ZeroQuant's token-wise scheme), so nothing is calibrated. With
codes on both sides a backend multiplies integers. Layers that read the same x share one rounding.
"""

from typing import Literal

from pydantic import Field
from torch import fx

from graphwright import structure
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor


class Activations(Pass):
    """Per-token rounding of what quantized layers read."""

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

    format: Literal["int8"] = Field("int8", description="codes of the activations")
    head: bool = Field(True, description="round the input of the vocabulary head too")

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds the input of every quantized linear layer."""
        rounded: dict[fx.Node, fx.Node] = {}
        with Editor(program, self.name, context.fuel) as editor:
            head = structure.head(program)
            for node in list(program.calls(quantized_linear.target)):
                source = node.args[0]
                if not isinstance(source, fx.Node) or (node is head and not self.head) or not editor.allow(node):
                    continue
                if source not in rounded:
                    rounded[source] = editor.call(quantize_dequantize, source, None, self.format, 0, before=node)
                rest = node.args[1:]
                new = editor.call(quantized_linear, rounded[source], *rest, before=node)
                editor.replace(node, new, str(node.args[1]))
        return PassResult(program, editor.sites)
