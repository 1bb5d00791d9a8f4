"""Experts choose tokens instead of tokens experts, so that every expert has the same work.

    before                                     after
    w, ids = moe_routing(logits, None, 2, …)   w, ids = expert_choice(logits, 0, 2.0)
    y = experts(x, w, ids, …)                  y = experts(x, w, ids, …)

Each expert takes the tokens of a call that have its highest softmax, as many as make `factor` experts per token in the
mean. A token may get many experts or none. What a token gets depends on all tokens of the call, also on later ones: for
a model that generates, the report warns that a step sees one token only, and chooses otherwise than a whole text does.
"""

import operator

import torch
from pydantic import Field

from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.ops import expert_choice
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, changed, moe_layers
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

WARNING = "an expert's choice among the tokens of a call is not causal: generation differs from one forward of the text"


class ExpertChoice(Pass):
    """Turns the choice around."""

    name = "expert_choice"
    kind = "approximate"
    paper = Paper("Mixture-of-Experts with Expert Choice Routing", "Zhou et al.", 2022, "2202.09368")
    requires = ("experts",)
    after = ("folded", "float_dtype")
    provides = ("expert_choice",)
    conflicts = ("fewer_experts", "fewer_active_experts", "shared_experts_fused", "expert_capacity")

    factor: float = Field(0.0, ge=0, description="mean number of experts per token; 0: what the router has")

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every router over ungrouped experts.

        Raises:
            PassError: the program is quantized.
        """
        refuse_after(self, program, ("quantized",))
        layers, misses = moe_layers(program)
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                if layer.capacity is not None or argument(layer.router, "num_groups") > 1:
                    misses.append(f"{layer.name}: its router has groups or a capacity")
                elif editor.allow(layer.router):
                    self._turn(editor, layer)
        notes = {"warning": WARNING} if editor.sites and program.metadata.causal else {}
        return PassResult(program, editor.sites, near_misses=misses, notes=notes)

    def _turn(self, editor: Editor, layer: MoeLayer) -> None:
        given = {name: argument(layer.router, name) for name in ("logits", "top_k", "scaling")}
        factor = self.factor or float(given["top_k"])
        both = editor.call(expert_choice, given["logits"], 0, factor, before=layer.node)
        weights, indices = (editor.call(operator.getitem, both, place, before=layer.node) for place in (0, 1))
        if given["scaling"] != 1:
            weights = editor.call(aten.mul.Tensor, weights, given["scaling"], before=layer.node)
        editor.replace(layer.node, changed(editor, layer.node, weights=weights, indices=indices), layer.name)
