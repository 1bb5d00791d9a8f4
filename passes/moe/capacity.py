"""A limit on the tokens that each expert takes, so that no expert makes the others wait; tokens beyond it are dropped.

    before                              after
    w, ids = moe_routing(logits, …)     w, ids = moe_routing(logits, …)
    y = experts(x, w, ids, …)           w, ids, dropped = expert_capacity(w, ids, E, 0, factor)
                                        y = experts(x, w, ids, …)

The capacity is a number of tokens, or a multiple of what each expert would take if all took the same, counted over the
tokens of one call. What is dropped adds nothing, so a token may be left with the residual stream alone. How many are
dropped is measured on the calibration data, call by call, and reported.
"""

import operator

from pydantic import Field

from graphwright.errors import PassError
from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.ops import expert_capacity
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, changed, dropped_share, moe_layers
from graphwright.program import Program
from graphwright.rewrite import Editor


class Capacity(Pass):
    """Limits what each expert takes."""

    name = "capacity"
    kind = "approximate"
    paper = Paper(
        "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
        "Lepikhin et al.",
        2020,
        "2006.16668",
    )
    requires = ("experts",)
    after = ("folded", "float_dtype", "fewer_experts", "fewer_active_experts")
    provides = ("expert_capacity",)
    conflicts = ("shared_experts_fused",)

    factor: float = Field(1.25, ge=0, description="capacity as a multiple of equal shares")
    tokens: int = Field(0, ge=0, description="capacity in tokens of one call, in the place of the factor")

    @property
    def calibrates(self) -> bool:
        """Always: what is dropped is measured."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Puts a capacity behind every router that has none.

        Raises:
            PassError: the capacity is 0, or there is nothing to calibrate on, or the program is quantized.
        """
        if not self.tokens and not self.factor:
            raise PassError("An expert of capacity 0 takes no token", fix="Give factor or tokens")
        refuse_after(self, program, ("quantized",))
        layers, misses = moe_layers(program)
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                if layer.capacity is None and editor.allow(layer.node):
                    self._limit(editor, layer)
        notes = {"dropped": dropped_share(program, context), **({"left": misses} if misses else {})}
        return PassResult(program, editor.sites, near_misses=misses, notes=notes)

    def _limit(self, editor: Editor, layer: MoeLayer) -> None:
        given = [argument(layer.node, name) for name in ("weights", "indices")]
        rest = (self.tokens, 0.0 if self.tokens else self.factor)
        both = editor.call(expert_capacity, *given, layer.count, *rest, before=layer.node)
        weights, indices = (editor.call(operator.getitem, both, place, before=layer.node) for place in (0, 1))
        editor.replace(layer.node, changed(editor, layer.node, weights=weights, indices=indices), layer.name)
