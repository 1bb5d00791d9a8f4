"""Experts that every token shares become experts like the others, which are always chosen.

    before                                          after
    w, ids = moe_routing(logits, None, 2, …)        w, ids = moe_routing(logits, None, 2, …, num_shared=2, …)
    y = experts(x, w, ids, up [E, …], …)            y = experts(x, w, ids, up [E + 2, …], …)
        + linear(silu(linear(x, G)) * linear(x, U), D)

A shared MLP as wide as several experts is cut into so many; where its width is no multiple, the last is filled up with
zeros. One that a sigmoid of the token weighs (Qwen) gives its weight to the router. A step of decoding then has two
products fewer. Biases, and an activation other than the experts', stay as they are.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional

from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.ops import gated_activation
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, changed, moe_layers, stored
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default}


@dataclass(frozen=True)
class Shared:
    """A shared MLP that is added to the routed experts.

    Attributes:
        gate: [F, K].
        up: [F, K].
        down: [N, F].
        weigher: its weight for each token before the sigmoid, or None.
        routed: what it is added to, a view of the experts' output.
        total: the sum.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    weigher: fx.Node | None
    routed: fx.Node
    total: fx.Node


class FuseSharedExperts(Pass):
    """Puts shared experts among the routed ones."""

    name = "fuse_shared_experts"
    kind = "exact"
    paper = Paper(
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        "Dai et al.",
        2024,
        "2401.06066",
    )
    requires = ("experts",)
    after = ("folded", "float_dtype", "fewer_experts", "narrower_experts", "merged_linear")
    provides = ("shared_experts_fused",)

    padding: float = Field(0.5, ge=0, description="zeros that may be added, as a part of the shared MLP")

    def run(self, program: Program, context: Context) -> PassResult:
        """Fuses every shared MLP that has the form of the experts.

        Raises:
            PassError: the program is quantized.
        """
        refuse_after(self, program, ("quantized",))
        layers, misses = moe_layers(program)
        with Editor(program, self.name, context.fuel) as editor:
            for layer in layers:
                found = _shared(program, layer)
                if isinstance(found, str):
                    misses.append(f"{layer.name}: {found}")
                    continue
                width = int(argument(layer.node, "down").meta["val"].shape[2])
                parts = -(-found.down.shape[1] // width)
                if parts * width > (1 + self.padding) * found.down.shape[1]:
                    misses.append(
                        f"{layer.name}: its shared MLP is {found.down.shape[1]} wide, and experts are {width}"
                    )
                elif editor.allow(layer.node):
                    _fuse(editor, layer, found, parts, width)
        return PassResult(program, editor.sites, near_misses=misses, notes={"left": misses} if misses else {})


def _shared(program: Program, layer: MoeLayer) -> Shared | str:
    """The shared MLP that is added to a layer, or why there is none to fuse."""
    node = layer.node
    if layer.capacity is not None or argument(layer.router, "num_shared"):
        return "its experts have a capacity, or shared ones already"
    if any(argument(node, name) is not None for name in ("up_bias", "down_bias")) or not argument(node, "gated"):
        return "its experts have biases or no gate"
    end = node
    while len(end.users) == 1 and next(iter(end.users)).target in VIEWS:
        end = next(iter(end.users))
    total = next(iter(end.users))
    if len(end.users) != 1 or total.target is not aten.add.Tensor:
        return "nothing is added to its experts alone"
    other, weigher = (a for a in total.args[:2] if a is not end), None
    down = _unviewed(next(other))
    if down.target is aten.mul.Tensor:
        pair = [_unviewed(a) for a in down.args[:2]]
        sigmoids = [a for a in pair if a.target is aten.sigmoid.default and a.meta["val"].shape[-1] == 1]
        if len(sigmoids) != 1:
            return "its shared MLP is weighed by something else than a sigmoid"
        weigher, down = sigmoids[0].args[0], next(a for a in pair if a is not sigmoids[0])
    return _mlp(program, layer, down, weigher, end)


def _mlp(program: Program, layer: MoeLayer, down: fx.Node, weigher: Any, end: fx.Node) -> Shared | str:
    weights = _rows(program, down)
    middle = _unviewed(down.args[0]) if weights is not None else down
    if weights is None or middle.target is not gated_activation.target:
        return "what is added is no gated MLP with constant weights"
    if argument(middle, "activation") != argument(layer.node, "activation"):
        return "its shared MLP has another activation"
    halves = [_rows(program, middle.args[place]) for place in (0, 1)]
    x = _unviewed(argument(layer.node, "x"))
    if any(half is None or half[1] is not x for half in halves):
        return "its shared MLP reads something else"
    gate, up = (half[0] for half in halves if half is not None)
    return Shared(gate, up, weights[0], weigher, end, next(iter(end.users)))


def _unviewed(node: Any) -> fx.Node:
    """What a chain of views reads."""
    while node.target in VIEWS and node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]:
        node = node.args[0]
    return node


def _rows(program: Program, node: fx.Node) -> tuple[Tensor, fx.Node] | None:
    """The weight and the input of a linear layer, or of some outputs of one that was merged with others."""
    node, part = _unviewed(node), slice(None)
    if node.target is aten.slice.Tensor and argument(node, "dim") in (-1, node.meta["val"].dim() - 1):
        part, node = slice(argument(node, "start"), argument(node, "end")), node.args[0]  # type: ignore[assignment]
    if node.target is not aten.linear.default or len(node.args) > 2 or node.args[1].op != "get_attr":
        return None
    return program.weight(node.args[1])[part], _unviewed(node.args[0])


def _fuse(editor: Editor, layer: MoeLayer, shared: Shared, parts: int, width: int) -> None:
    program, before = editor.program, shared.total
    missing = parts * width - shared.down.shape[1]
    gate, up = (functional.pad(w, (0, 0, 0, missing)).unflatten(0, (parts, width)) for w in (shared.gate, shared.up))
    down = functional.pad(shared.down, (0, missing)).unflatten(1, (parts, width)).movedim(1, 0)
    old = stored(program, layer)
    stacks = {"up": torch.cat([old["up"], torch.cat([gate, up], 1)]), "down": torch.cat([old["down"], down])}
    read = {
        name: editor.weight(f"{layer.name}_shared_{name}", stack.contiguous(), before) for name, stack in stacks.items()
    }
    weight = shared.weigher
    if weight is not None:
        flat = (
            weight
            if weight.meta["val"].dim() == 2
            else editor.call(aten.reshape.default, weight, [-1, 1], before=before)
        )
        weight = editor.call(aten.sigmoid.default, flat, before=before)
    new = {"num_shared": parts, "first_shared": layer.count, "shared_weight": weight}
    router = changed(editor, layer.router, before, **new)
    weights, indices = (editor.call(operator.getitem, router, place, before=before) for place in (0, 1))
    dtype = argument(layer.node, "weights").meta["val"].dtype
    if dtype != weights.meta["val"].dtype:
        weights = editor.call(aten.to.dtype, weights, dtype, before=before)
    node = changed(editor, layer.node, before, weights=weights, indices=indices, **read)
    if shared.total.meta["val"].dim() != 2:
        node = editor.call(aten.reshape.default, node, shared.routed.args[1], before=before)
    editor.replace(shared.total, node, layer.name)
