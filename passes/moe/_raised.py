"""Raised mixtures of experts: finding them, seeing which experts are used, and giving their calls other arguments."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import calibration
from graphwright.expert_quantizer import Routed
from graphwright.match import argument
from graphwright.ops import expert_capacity, experts, moe_routing
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten

PASSING = {operator.getitem, aten.to.dtype, aten.view.default, aten.reshape.default, expert_capacity.target}

EXCLUDED = -1e30
"""Added to the score of an expert that must not be chosen; finite, because kernels compare with numbers below it."""


@dataclass(frozen=True)
class MoeLayer:
    """A call of `experts` with stored weights, and the `moe_routing` that it comes from."""

    node: fx.Node
    router: fx.Node
    capacity: fx.Node | None

    @property
    def name(self) -> str:
        """Name of the first stack."""
        return str(argument(self.node, "up").target)

    @property
    def count(self) -> int:
        """Stored experts."""
        return int(argument(self.node, "up").meta["val"].shape[0])


def moe_layers(program: Program) -> tuple[list[MoeLayer], list[str]]:
    """All layers whose router is known, and why the others are not."""
    found, misses = [], []
    for node in program.calls(experts.target):
        router: Any = argument(node, "indices")
        capacity = None
        while router.target in PASSING:
            capacity = router if router.target is expert_capacity.target else capacity
            router = router.args[0]
        parts = [argument(node, name) for name in ("up", "down")]
        if router.target is not moe_routing.target:
            misses.append(f"the router of {node.name} is not recognised, but {router.name}")
        elif any(part.op != "get_attr" for part in parts):
            misses.append(f"the weights of {node.name} are computed")
        else:
            found.append(MoeLayer(node, router, capacity))
    return found, misses


def observe(
    program: Program, context: Context, layers: Sequence[MoeLayer], visit: Callable[[MoeLayer, Routed], None]
) -> None:
    """Shows the tokens of each layer and their choices on the calibration data, one layer after another."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    stops = []
    for layer in layers:
        x, indices = (argument(layer.node, name) for name in ("x", "indices"))
        stops.append(calibration.Stop(max(x, indices, key=order.__getitem__), layer.name, (x, indices)))
    ranked = sorted(range(len(stops)), key=lambda place: order[stops[place].node])

    def show(index: int, seen: Routed) -> dict[fx.Node, Tensor]:
        visit(layers[ranked[index]], seen)
        return {}

    batches = calibration.samples(program, context)
    calibration.walk(program, batches, [stops[place] for place in ranked], Routed, show, context.progress)


def changed(editor: Editor, node: fx.Node, before: fx.Node | None = None, **new: Any) -> fx.Node:
    """A call of the same op with some arguments changed, just before `before` or the node itself."""
    names = [formal.name for formal in node.target._schema.arguments]
    values = [new[name] if name in new else argument(node, name) for name in names]
    return editor.call(node.target, *values, before=before or node)


def restack(editor: Editor, layer: MoeLayer, place: Sequence[int], stacks: Mapping[str, Tensor], bias: bool) -> None:
    """Gives a layer other stacks of experts.

    Args:
        editor: of the program.
        layer: of it.
        place: for each stored expert, its place in the new stacks; -1 for none.
        stacks: the new `up`, `up_bias`, `down`, `down_bias`, those that there are.
        bias: keep experts without a place from being chosen; else their choices are dropped.
    """
    program, node = editor.program, layer.node
    old = argument(layer.router, "expert_of")
    given = torch.arange(layer.count) if old is None else program.weight(old)
    table = torch.tensor([*place, -1])[given]  # -1 reads the last entry
    new: dict[str, Any] = {"expert_of": editor.weight(f"{layer.name}_expert_of", table, layer.router)}
    if bias:
        correction = argument(layer.router, "correction_bias")
        known = torch.zeros(len(table)) if correction is None else program.weight(correction).float()
        new["correction_bias"] = editor.weight(
            f"{layer.name}_correction", known.masked_fill(table < 0, EXCLUDED), layer.router
        )
    editor.replace(layer.router, changed(editor, layer.router, **new), layer.name)
    read = {
        name: editor.weight(f"{argument(node, name).target}_{editor.origin}", tensor.contiguous(), node)
        for name, tensor in stacks.items()
    }
    editor.replace(node, changed(editor, node, **read), layer.name)


def stored(program: Program, layer: MoeLayer) -> dict[str, Tensor]:
    """The stacks of a layer by the name of the argument."""
    nodes = {name: argument(layer.node, name) for name in ("up", "up_bias", "down", "down_bias")}
    return {name: program.weight(node) for name, node in nodes.items() if node is not None}


def expert_outputs(
    program: Program, layer: MoeLayer, rows: Tensor, stacks: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What each expert makes of rows [T, K]: [E, T, N]."""
    given = stored(program, layer) if stacks is None else stacks
    names = ("activation", "gated", "alpha", "limit")
    rest = [argument(layer.node, name) for name in names]
    parts = [given["up"], given.get("up_bias"), given["down"], given.get("down_bias")]
    wide = [None if part is None else part.float() for part in parts]
    ones = torch.ones(len(rows), 1)
    count = len(given["up"])
    return torch.stack([experts.reference(rows, ones, ones.long() * e, *wide, *rest) for e in range(count)])


def dropped_share(program: Program, context: Context) -> dict[str, float]:
    """The part of all choices that capacities drop on the calibration data, by layer."""
    layers = [layer for layer in moe_layers(program)[0] if layer.capacity is not None]
    found: dict[str, float] = {}

    def visit(layer: MoeLayer, seen: Routed) -> None:
        total = sum(part.numel() for part in seen.choices)
        found[layer.name] = 1 - float(seen.usage(layer.count).sum()) / max(total, 1)

    if layers:
        observe(program, context, layers, visit)
    return found
