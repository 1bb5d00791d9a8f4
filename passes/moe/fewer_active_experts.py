"""Fewer experts work for a token: a smaller top-k, or those left out that the router gives little to.

    before                                          after
    w, ids = moe_routing(logits, None, 8, …)        w, ids = moe_routing(logits, None, 4, …)
                                             or     w, ids = moe_routing(logits, None, 8, …, skip_ratio=0.3)

A choice is skipped whose score is below a part of the token's best score, so easy tokens take fewer experts. Without an
option that part is, layer by layer, the median over the calibration tokens of the second score over the first, as in
the paper. Weights that the router normalizes still sum to one.
"""

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import calibration, shapes
from graphwright.errors import PassError
from graphwright.expert_quantizer import Routed
from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, changed, moe_layers, observe
from graphwright.program import Program
from graphwright.rewrite import Editor


class FewerActiveExperts(Pass):
    """Lets tokens use fewer experts."""

    name = "fewer_active_experts"
    kind = "approximate"
    paper = Paper(
        "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language Models",
        "Lu et al.",
        2024,
        "2402.14800",
    )
    requires = ("experts",)
    after = ("folded", "float_dtype", "fewer_experts", "shared_experts_fused")
    provides = ("fewer_active_experts",)

    top_k: int = Field(0, ge=0, description="experts per token; 0: as many as before")
    skip_ratio: float | None = Field(
        None, ge=0, le=1, description="part of the best score below which a choice is skipped; measured when left out"
    )

    @property
    def calibrates(self) -> bool:
        """Always: how many experts work is measured."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Changes the routers, and counts on calibration data how many experts work for a token.

        Raises:
            PassError: top_k is larger than it was, or there is nothing to calibrate on, or the program is quantized.
        """
        refuse_after(self, program, ("quantized",))
        layers, misses = moe_layers(program)
        for layer in layers:
            if self.top_k > argument(layer.router, "top_k"):
                raise PassError(
                    f"top_k is {self.top_k}, and tokens choose {argument(layer.router, 'top_k')} experts",
                    where=layer.name,
                    fix="Give fewer",
                )
        before, ratios = _active(program, context, layers), self._ratios(program, context, layers)
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                if self.top_k and layer.capacity is not None:
                    misses.append(f"{layer.name}: its experts have a capacity, which counts choices")
                elif editor.allow(layer.router):
                    top_k = self.top_k or argument(layer.router, "top_k")
                    router = changed(editor, layer.router, skip_ratio=ratios[layer.name], top_k=top_k)
                    editor.replace(layer.router, router, layer.name)
                    shapes.update(program.module, {router})
        notes = {"skip_ratio": ratios, "active_before": before}
        notes["active"] = _active(program, context, moe_layers(program)[0])
        return PassResult(program, editor.sites, near_misses=misses, notes=notes)

    def _ratios(self, program: Program, context: Context, layers: list[MoeLayer]) -> dict[str, float]:
        """The part of the best score that each layer asks for."""
        if self.skip_ratio is not None or self.top_k:
            return {layer.name: self.skip_ratio or 0.0 for layer in layers}
        found: dict[str, float] = {}

        def visit(index: int, seen: _Ratios) -> dict[fx.Node, Tensor]:
            found[layers[index].name] = seen.median()
            return {}

        def stop(layer: MoeLayer) -> calibration.Stop:
            top_k = int(argument(layer.router, "top_k"))
            return calibration.Stop(argument(layer.node, "weights"), layer.name, (), lambda: _Ratios(top_k))

        batches = calibration.samples(program, context)
        stops = [stop(layer) for layer in layers]
        calibration.walk(program, batches, stops, lambda: _Ratios(1), visit, context.progress)
        return found


class _Ratios:
    """The second score over the first of every token."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.seen: list[Tensor] = []

    def add(self, weights: Tensor) -> None:
        """Takes weights [T, J], those of shared experts last."""
        if self.top_k > 1:
            best = weights[:, : self.top_k].topk(2, -1).values
            self.seen.append(best[:, 1] / best[:, 0].clamp_min(1e-30))

    def median(self) -> float:
        """0 where tokens have one expert."""
        return float(torch.cat(self.seen).median()) if self.seen else 0.0


def _active(program: Program, context: Context, layers: list[MoeLayer]) -> dict[str, float]:
    """Mean number of experts that work for a calibration token, by layer."""
    found: dict[str, float] = {}

    def visit(layer: MoeLayer, seen: Routed) -> None:
        tokens = sum(len(part) for part in seen.rows)
        found[layer.name] = float(seen.usage(layer.count).sum()) / max(tokens, 1)

    observe(program, context, layers, visit)
    return found
