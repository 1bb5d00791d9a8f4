"""Experts that do much the same are merged into one.

    before                                   after, experts 1 and 3 of 4 merged
    w, ids = moe_routing(logits, …)          w, ids = moe_routing(logits, …, expert_of=[0, 1, 2, 1])
    y = experts(x, w, ids, up [4, …], …)     y = experts(x, w, ids, up [3, …], …)

Alike are experts whose outputs on calibration tokens of the layer are near each other, relative to their size. They
are clustered by average linkage, and a cluster's weights are their mean, weighted by how often each is chosen. The
router stays: who chose either now chooses both. Merging equal experts changes nothing. Experts that are alike but for
the order of their channels are not found.
"""

import torch
from pydantic import Field
from torch import Tensor

from graphwright.expert_quantizer import Routed
from graphwright.layer_pass import refuse_after
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, expert_outputs, moe_layers, observe, restack, stored
from graphwright.program import Program
from graphwright.rewrite import Editor

ROWS = 64
"""Calibration tokens on which experts are compared."""


class MergeExperts(Pass):
    """Merges the experts of every layer that are most alike."""

    name = "merge_experts"
    kind = "approximate"
    paper = Paper(
        "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", "Chen et al.", 2024, "2410.08589"
    )
    requires = ("experts",)
    after = ("folded", "float_dtype")
    provides = ("fewer_experts",)

    ratio: float = Field(0.25, ge=0, lt=1, description="part of a layer's experts that is saved by merging")
    distance: float = Field(2.0, gt=0, description="experts further apart stay; 0: equal outputs, 1.4: unrelated ones")

    @property
    def calibrates(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Clusters the experts of each layer and merges them.

        Raises:
            PassError: there is nothing to calibrate on, or the program is quantized.
        """
        refuse_after(self, program, ("quantized", "shared_experts_fused"))
        layers, misses = moe_layers(program)
        plans: dict[str, tuple[list[list[int]], Tensor, Tensor]] = {}

        def visit(layer: MoeLayer, seen: Routed) -> None:
            rows = seen.pooled(ROWS)
            clusters = self._clusters(expert_outputs(program, layer, rows))
            plans[layer.name] = (clusters, seen.usage(layer.count), rows)

        observe(program, context, layers, visit)
        merged: dict[str, list[list[int]]] = {}
        errors: dict[str, float] = {}
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                clusters, usage, rows = plans[layer.name]
                if len(clusters) == layer.count:
                    continue
                if layer.capacity is not None:
                    misses.append(f"{layer.name}: its experts have a capacity, which merged ones would share")
                elif editor.allow(layer.node):
                    merged[layer.name] = [cluster for cluster in clusters if len(cluster) > 1]
                    old = expert_outputs(program, layer, rows)
                    place = [next(i for i, c in enumerate(clusters) if e in c) for e in range(layer.count)]
                    stacks = {name: _means(tensor, clusters, usage) for name, tensor in stored(program, layer).items()}
                    new = expert_outputs(program, layer, rows, stacks)[place]
                    errors[layer.name] = float((new - old).norm() / old.norm().clamp_min(1e-30))
                    restack(editor, layer, place, stacks, bias=False)
        notes = {"merged": merged, **({"left": misses} if misses else {})}
        return PassResult(program, editor.sites, near_misses=misses, notes=notes, layer_errors=errors)

    def _clusters(self, outputs: Tensor) -> list[list[int]]:
        """Which experts go together, by their outputs [E, …]."""
        flat = outputs.flatten(1)
        norms = flat.norm(dim=1).clamp_min(1e-30)
        distance = torch.cdist(flat[None], flat[None])[0] / (norms[:, None] * norms).sqrt()
        clusters = [[index] for index in range(len(flat))]
        while len(clusters) > len(flat) - int(self.ratio * len(flat)):
            pairs = [
                (float(distance[one][:, other].mean()), i, j)
                for i, one in enumerate(clusters)
                for j, other in enumerate(clusters[:i])
            ]
            least, i, j = min(pairs)
            if least > self.distance:
                break
            clusters[j] += clusters.pop(i)
        return [sorted(cluster) for cluster in clusters]


def _means(tensor: Tensor, clusters: list[list[int]], usage: Tensor) -> Tensor:
    """One expert for each cluster; one that nobody chose counts a little."""
    made = []
    for cluster in clusters:
        shares = usage[cluster].double().clamp_min(1e-3)
        shares = (shares / shares.sum()).view(-1, *[1] * (tensor.dim() - 1))
        made.append((tensor[cluster].double() * shares).sum(0).to(tensor.dtype))
    return torch.stack(made)
