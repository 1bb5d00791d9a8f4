"""Experts that are seldom chosen are removed, with their weights.

    before                                   after, without expert 2 of 4
    w, ids = moe_routing(logits, None, …)    w, ids = moe_routing(logits, [0, 0, -1e30, 0], …, expert_of=[0, 1, -1, 2])
    y = experts(x, w, ids, up [4, …], …)     y = experts(x, w, ids, up [3, …], …)

How often each is chosen is counted on calibration data. The router keeps its logits, so that scores stay what they
were, and the next best expert is chosen instead of a removed one. With groups of experts, whose worth would change, a
choice of a removed expert is dropped. Removing an expert that is never chosen changes nothing.
"""

import torch
from pydantic import Field
from torch import Tensor

from graphwright.expert_quantizer import Routed
from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, moe_layers, observe, restack, stored
from graphwright.program import Program
from graphwright.rewrite import Editor


class PruneExperts(Pass):
    """Removes the least used experts of every layer."""

    name = "prune_experts"
    kind = "approximate"
    paper = Paper(
        "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language Models",
        "Lu et al.",
        2024,
        "2402.14800",
    )
    requires = ("experts",)
    after = ("folded", "float_dtype")
    provides = ("fewer_experts",)

    ratio: float = Field(0.0, ge=0, lt=1, description="part of a layer's experts that goes, the least used first")
    unused: bool = Field(True, description="experts that no calibration token chooses go too")

    @property
    def calibrates(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Counts choices, then cuts the stacks.

        Raises:
            PassError: there is nothing to calibrate on, or the program is quantized.
        """
        refuse_after(self, program, ("quantized", "shared_experts_fused"))
        layers, misses = moe_layers(program)
        usage: dict[str, Tensor] = {}

        def visit(layer: MoeLayer, seen: Routed) -> None:
            usage[layer.name] = seen.usage(layer.count)

        observe(program, context, layers, visit)
        removed: dict[str, list[int]] = {}
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                gone = self._gone(layer, usage[layer.name])
                if gone and editor.allow(layer.node):
                    removed[layer.name] = gone
                    kept = [index for index in range(layer.count) if index not in gone]
                    place = [kept.index(index) if index in kept else -1 for index in range(layer.count)]
                    stacks = {name: tensor[kept] for name, tensor in stored(program, layer).items()}
                    restack(editor, layer, place, stacks, argument(layer.router, "num_groups") == 1)
        counts = {name: found.tolist() for name, found in usage.items()}
        notes = {"removed": removed, "usage": counts, **({"left": misses} if misses else {})}
        return PassResult(program, editor.sites, near_misses=misses, notes=notes)

    def _gone(self, layer: MoeLayer, usage: Tensor) -> list[int]:
        """The experts to remove; so many stay that a token can choose."""
        wanted = int(self.ratio * layer.count)
        if self.unused:
            wanted = max(wanted, int((usage == 0).sum()))
        most = layer.count - int(argument(layer.router, "top_k"))
        order = torch.argsort(usage, stable=True).tolist()
        return sorted(order[: max(0, min(wanted, most))])
