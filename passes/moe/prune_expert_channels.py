"""Structured pruning inside experts: each expert loses the channels of its MLP that carry least.

    before                                          after, a quarter of the channels removed
    y = experts(x, w, ids, up [E, 2F, K], …,        y = experts(x, w, ids, up [E, 3F/2, K], …,
                down [E, N, F], …)                              down [E, N, 3F/4], …)

All experts of a layer lose the same number, so that their weights still stack, and every expert chooses its own. For
channels of layers that are no experts see `prune_channels`. Scores: `wanda`, the squared weights that read a channel
times the energy of what it carries on the tokens of its expert (Sun et al. 2023, arXiv:2306.11695), and `magnitude`,
the squares of all its weights. Removing channels that carry nothing changes nothing.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from graphwright.errors import PassError
from graphwright.expert_quantizer import POOLED_ROWS, Routed
from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.ops.experts import activate
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, changed, expert_outputs, moe_layers, observe, stored
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.unit_pruner import removed_to_multiple

COMPARED_ROWS = 64
"""Calibration tokens on which the error of a layer is measured."""


class PruneExpertChannels(Pass):
    """Cuts channels inside the experts of every layer."""

    name = "prune_expert_channels"
    kind = "approximate"
    paper = Paper("LLM-Pruner: On the Structural Pruning of Large Language Models", "Ma et al.", 2023, "2305.11627")
    requires = ("experts",)
    after = ("folded", "float_dtype", "fewer_experts")
    provides = ("narrower_experts",)

    ratio: float = Field(0.2, gt=0, lt=1, description="part of each expert's channels to remove, rounded down")
    multiple: int = Field(8, gt=0, description="the number of channels that stay is a multiple of this")
    score: Literal["magnitude", "wanda"] = Field("wanda", description="squared weights, or weights times activations")
    min_tokens: int = Field(64, gt=0, description="an expert that sees fewer is scored on tokens of the whole layer")

    @property
    def calibrates(self) -> bool:
        """Magnitudes need no data."""
        return self.score == "wanda"

    def run(self, program: Program, context: Context) -> PassResult:
        """Cuts the stacks of every layer.

        Raises:
            PassError: there is no layer of experts, the ratio removes nothing of any, an earlier pass is in the way,
                or there is nothing to calibrate on.
        """
        refuse_after(self, program, ("quantized", "sparse", "shared_experts_fused"))
        layers, misses = moe_layers(program)
        self._refuse_nothing(layers, misses)
        keep: dict[str, Tensor] = {}
        shown: dict[str, Tensor] = {}

        def visit(layer: MoeLayer, seen: Routed) -> None:
            keep[layer.name] = self._kept(_carried(program, layer, seen, self.min_tokens))
            shown[layer.name] = seen.pooled(COMPARED_ROWS)

        if self.calibrates:
            observe(program, context, layers, visit)
        else:
            keep = {layer.name: self._kept(_magnitudes(program, layer)) for layer in layers}
        errors: dict[str, float] = {}
        removed: dict[str, list[int]] = {}
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                places, width = keep[layer.name], _inner(program, layer)
                if places.shape[1] == width or not editor.allow(layer.node):
                    continue
                stacks = _cut(program, layer, places)
                if layer.name in shown:
                    errors[layer.name] = _error(program, layer, shown[layer.name], stacks)
                new = {
                    name: editor.weight(f"{argument(layer.node, name).target}_cut", tensor, layer.node)
                    for name, tensor in stacks.items()
                }
                editor.replace(layer.node, changed(editor, layer.node, **new), layer.name)
                removed[layer.name] = [width - places.shape[1], width]
        notes = {"removed": removed, **({"left": misses} if misses else {})}
        return PassResult(program, editor.sites, near_misses=misses, notes=notes, layer_errors=errors)

    def _refuse_nothing(self, layers: list[MoeLayer], misses: list[str]) -> None:
        if not layers:
            raise PassError(
                "No layer of experts was found" + (f": {misses[0]}" if misses else ""),
                fix="List experts before this pass, or prune_channels for layers that are no experts",
            )
        widths = {int(argument(layer.node, "down").meta["val"].shape[2]): layer.name for layer in layers}
        if not any(self._removed(width) for width in widths):
            widest = max(widths)
            legal = next((n for n in range(1, widest) if (widest - n) % self.multiple == 0), None)
            raise PassError(
                f"A ratio of {self.ratio:g} removes none of {widest} channels of an expert, of which a multiple of "
                f"{self.multiple} stays",
                where=widths[widest],
                fix=f"The nearest ratio that is legal is {legal / widest:.3g}" if legal else "Ask for a lower multiple",
            )

    def _removed(self, width: int) -> int:
        """How many of an expert's channels go."""
        return removed_to_multiple(width, self.ratio, self.multiple)

    def _kept(self, scores: Tensor) -> Tensor:
        """The channels that stay, in order: int64 [E, F'], from scores [E, F]."""
        stay = scores.shape[1] - self._removed(scores.shape[1])
        return scores.argsort(dim=1, descending=True, stable=True)[:, :stay].sort(dim=1).values


def _inner(program: Program, layer: MoeLayer) -> int:
    return int(program.weight(argument(layer.node, "down")).shape[2])


def _by_channel(tensor: Tensor, width: int) -> Tensor:
    """Rows of `up` [E, 2F or F, …] as [E, 2 or 1, F, …]."""
    return tensor.unflatten(1, (-1, width))


def _magnitudes(program: Program, layer: MoeLayer) -> Tensor:
    """Squares of all weights of each channel, [E, F]."""
    width, stacks = _inner(program, layer), stored(program, layer)
    total = stacks["down"].float().square().sum(1)
    for name in ("up", "up_bias"):
        if name in stacks:
            squares = _by_channel(stacks[name].float().square(), width).sum(1)
            total += squares.flatten(2).sum(2) if squares.dim() > 2 else squares
    return total


def _carried(program: Program, layer: MoeLayer, seen: Routed, min_tokens: int) -> Tensor:
    """Squared weights that read each channel, times the mean energy of the channel on its expert's tokens: [E, F]."""
    stacks = stored(program, layer)
    middle = [argument(layer.node, name) for name in ("activation", "gated", "alpha", "limit")]
    scores = []
    for expert in range(layer.count):
        rows = seen.of(expert)
        if len(rows) < min_tokens:
            rows = seen.pooled(POOLED_ROWS)
        bias = stacks["up_bias"][expert].float() if "up_bias" in stacks else None
        inner = functional.linear(rows.float(), stacks["up"][expert].float(), bias)
        energy = activate(inner, *middle).square().mean(0)
        scores.append(stacks["down"][expert].float().square().sum(0) * energy)
    return torch.stack(scores)


def _cut(program: Program, layer: MoeLayer, places: Tensor) -> dict[str, Tensor]:
    """The stacks that change, with only the given channels [E, F'] of each expert."""
    width, found = _inner(program, layer), {}
    for name, tensor in stored(program, layer).items():
        if name == "down":
            found[name] = tensor.gather(2, places[:, None].expand(-1, tensor.shape[1], -1))
        elif name != "down_bias":
            parts = _by_channel(tensor, width)
            index = places[:, None].expand(-1, parts.shape[1], -1)
            index = index if tensor.dim() == 2 else index[..., None].expand(-1, -1, -1, parts.shape[3])
            found[name] = parts.gather(2, index).flatten(1, 2)
    return found


def _error(program: Program, layer: MoeLayer, rows: Tensor, stacks: dict[str, Tensor]) -> float:
    """How far the outputs of all experts move, relative to their size."""
    old = expert_outputs(program, layer, rows)
    new = expert_outputs(program, layer, rows, {**stored(program, layer), **stacks})
    return float((new - old).norm() / old.norm().clamp_min(1e-30))
