"""QuaRot: activations in a rotated basis have no outliers, and the rotations are folded into the weights.

The residual stream is rotated by a random Hadamard matrix: its norms' gains move into the layers behind them, and
what writes to it and reads from it is multiplied by the matrix. The heads of the values are rotated on their way to the
output projection. What is left, the inputs of the down projections, is transformed at run time by
`hadamard_transform`, whose inverse is folded into the weights. The function stays what it was.
"""

import torch
from pydantic import Field
from torch import fx

from graphwright import structure
from graphwright.errors import PassError
from graphwright.folding import before_per_token, constant, scale_sites
from graphwright.ops import hadamard_transform, rms_norm
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.rotation import NoStream, hadamard, residual_stream, rotate, rotate_heads, rotate_stream


class Quarot(Pass):
    """Rotations that take outliers out of activations."""

    name = "quarot"
    kind = "exact"
    paper = Paper("QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", "Ashkboos et al.", 2024, "2404.00456")
    requires = ("linear",)
    after = ("float_dtype", "rope", "attention", "gated_activation", "rms_norm")
    provides = ("folded",)

    online: bool = Field(True, description="transform what no folded rotation reaches, at run time")

    def run(self, program: Program, context: Context) -> PassResult:
        """Rotates the stream, the heads and the rest.

        Raises:
            PassError: the residual stream cannot be rotated; the node in the way is named.
        """
        stream = residual_stream(program)
        if isinstance(stream, NoStream):
            raise PassError(
                "The residual stream cannot be rotated",
                where=stream.reason,
                fix="Use smoothquant, which needs no rotation, or a recipe without quarot",
            )
        generator = context.generator()
        with Editor(program, self.name, context.fuel) as editor:
            rotate_stream(editor, stream, hadamard(stream.width, generator))
            turned = self._heads(editor, program, generator)
            transformed = self._online(editor, program, turned) if self.online else 0
        notes = {"norms": len(stream.norms), "heads": len(turned), "online": transformed}
        return PassResult(program, editor.sites, notes=notes)

    def _heads(self, editor: Editor, program: Program, generator: torch.Generator) -> set[fx.Node]:
        """Rotates the values of each attention; returns the tensors whose readers that served."""
        turned = set()
        for site in scale_sites(program):
            if site.attention is not None:
                head_dim = int(site.attention.args[2].meta["val"].shape[-1])
                if rotate_heads(editor, site, hadamard(head_dim, generator)):
                    turned.add(site.source)
        return turned

    def _online(self, editor: Editor, program: Program, turned: set[fx.Node]) -> int:
        """Transforms the inputs of linear layers that read neither a norm nor rotated heads."""
        count = 0
        made: dict[fx.Node, fx.Node] = {}
        for node, weight in structure.linears(program):
            source = node.args[0]
            if (
                not isinstance(source, fx.Node)
                or source in turned
                or before_per_token(source).target is rms_norm.target
            ):
                continue
            block = int(weight.meta["val"].shape[1])
            block &= -block
            operand = constant(node, 1, 1)
            if block < 2 or operand is None:
                continue
            rotate(editor, operand, sylvester(block, int(weight.meta["val"].shape[1])))
            if source not in made:
                made[source] = editor.call(hadamard_transform, source, block, before=node)
            node.update_arg(0, made[source])
            count += 1
        return count


def sylvester(block: int, width: int) -> torch.Tensor:
    """The matrix [width, width] of `hadamard_transform`, float64."""
    return hadamard_transform.reference(torch.eye(width), block).double()
