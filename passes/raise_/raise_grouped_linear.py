"""Raising the expert products of dropless mixtures of experts.

    before                                             after
    y = transformers::grouped_mm_fallback(x, W, ends)  y = grouped_linear(x, W, ends)
    y = _grouped_mm(x, W, ends)

Besides giving the product one name, this frees the program from ops that only exist while the modelling library is
imported. Routing and combination stay ATen.
"""

import torch

from graphwright.match import argument
from graphwright.ops import grouped_linear
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

SPELLINGS = {"aten::_grouped_mm": ("self", "mat2", "offs"), "transformers::grouped_mm_fallback": None}
"""Ops that mean a grouped product, with the names of their arguments (None: the first three)."""


class RaiseGroupedLinear(Pass):
    """Finds products of row groups with stacked weights."""

    name = "raise_grouped_linear"
    kind = "exact"
    paper = Paper("MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", "Gale et al.", 2022, "2211.15841")
    provides = ("grouped_linear",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces grouped products of a matrix with stacked weights."""
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.calls():
                target = node.target
                if not isinstance(target, torch._ops.OpOverload) or target._schema.name not in SPELLINGS:
                    continue
                names = SPELLINGS[target._schema.name]
                x, weight, ends = (argument(node, n) for n in names) if names else node.args[:3]
                ranks = (x.meta["val"].dim(), weight.meta["val"].dim())
                if ranks == (2, 3) and ends is not None and editor.allow(node):
                    editor.replace(node, editor.call(grouped_linear, x, weight, ends, before=node))
        return PassResult(program, editor.sites)
