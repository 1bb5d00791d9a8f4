"""Structured pruning of whole layers: those that change the residual stream least are taken out of the graph.

Block influence is 1 - E[cos(x, y)] of the stream x before a layer and y behind it (ShortGPT); low influence goes first.
Layers are found from the dataflow: the points of the stream are the sums that everything on the way from the embedding
to the output passes through (dominators), and a layer reaches from one point to the last before the next attention.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional

from graphwright import calibration, structure
from graphwright.calibration import Stop
from graphwright.dependency import settle
from graphwright.errors import PassError
from graphwright.layer_pass import refuse_after
from graphwright.ops import attention
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


@dataclass
class Rows:
    """All rows that flow by, kept until the next point of the stream is reached."""

    parts: list[Tensor]

    def add(self, rows: Tensor) -> None:
        """Keeps a batch."""
        self.parts.append(rows.clone())


class DropLayers(Pass):
    """Removes whole layers."""

    name = "drop_layers"
    kind = "approximate"
    paper = Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", "Men et al.", 2024, "2403.03853"
    )
    requires = ("linear", "attention", "rope", "rms_norm", "gated_activation", "grouped_heads", "mask")
    after = ("float_dtype",)
    provides = ("fewer_layers",)

    count: int = Field(1, gt=0, description="layers to remove")
    ratio: float = Field(
        0.0, ge=0, lt=1, description="part of the layers to remove, rounded down; 0 leaves it to count"
    )

    @property
    def calibrates(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Removes the layers of least influence.

        Raises:
            PassError: there are not more layers than are to go, or caches are in the graph.
        """
        refuse_after(self, program, ("kv_cache", "explicit_kv_cache"))
        found = layers(program)
        count = max(1, int(self.ratio * len(found))) if self.ratio else self.count
        if count >= len(found):
            raise PassError(
                f"{count} layers are to go and the program has {len(found)} that can",
                fix=f"The nearest count that is legal is {len(found) - 1}"
                if len(found) > 1
                else "Prune channels or heads instead",
            )
        influence = self._influence(program, context, found)
        chosen = sorted(range(len(found)), key=lambda index: influence[index])[:count]
        with Editor(program, self.name, context.fuel) as editor:
            removed = [index for index in sorted(chosen) if editor.allow(found[index][1])]
            # From the last to the first, or a layer would read what is gone.
            for index in reversed(removed):
                before, behind = found[index]
                behind.replace_all_uses_with(before, delete_user_cb=lambda user: True)
                editor.note(behind, f"layer {index}")
            program.graph.eliminate_dead_code()
            settle(program)
        notes: dict[str, Any] = {"influence": influence, "removed": removed}
        return PassResult(program, editor.sites, notes=notes)

    def _influence(self, program: Program, context: Context, found: list[tuple[fx.Node, fx.Node]]) -> list[float]:
        points = [found[0][0], *(behind for _, behind in found)]
        influence: list[float] = []
        last: list[Rows] = []

        def visit(index: int, collected: Rows) -> dict[fx.Node, Tensor]:
            if last:
                pairs = zip(last.pop().parts, collected.parts, strict=True)
                cosines = torch.cat([functional.cosine_similarity(before, behind) for before, behind in pairs])
                influence.append(1 - float(cosines.double().mean()))
            last.append(collected)
            return {}

        stops = [Stop(node, f"{self.name} {index}") for index, node in enumerate(points)]
        batches = calibration.samples(program, context)
        calibration.walk(program, batches, stops, lambda: Rows([]), visit, context.progress)
        return influence


def layers(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Every layer that can go, as the points of the residual stream before and behind it, in graph order.

    The points of one layer have equal shapes and dtypes, and every two neighbours in the list share a point.
    """
    points = _points(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    attentions = [order[node] for node in program.calls(attention.target)]
    starts = [
        point
        for point, following in itertools.pairwise(points)
        if any(order[point] < place < order[following] for place in attentions)
    ]
    ends = [*starts[1:], points[-1]] if starts else []
    return [(before, behind) for before, behind in zip(starts, ends, strict=True) if before is not behind]


def _points(program: Program) -> list[fx.Node]:
    """The stream's points: where it starts, and the sums that all paths to the output pass."""
    found = structure.embeddings(program)
    output = program.graph.output_node()
    if not found or not isinstance(output.args[0], (tuple, list)):
        raise PassError("The program looks up no token embeddings, so it has no residual stream", fix="Prune channels")
    embedding = found[0][0]
    flow: networkx.DiGraph[fx.Node] = networkx.DiGraph()
    flow.add_edges_from((node, user) for node in program.graph.nodes for user in node.users)
    final = structure.head(program) or output
    above = networkx.immediate_dominators(flow, embedding)
    chain = [final]
    while chain[-1] is not embedding:
        if chain[-1] not in above or above[chain[-1]] is chain[-1]:
            raise PassError("The output does not follow from the token embeddings", fix="Prune channels")
        chain.append(above[chain[-1]])
    chain.reverse()
    sums = [node for node in chain if node.target is aten.add.Tensor]
    first = max((node for node in chain if node not in sums and not _behind(node, sums)), key=chain.index)
    like = first.meta["val"]
    points = [first, *(_unflattened(chain, node, like) for node in sums)]
    return [p for p in points if p.meta["val"].shape == like.shape and p.meta["val"].dtype == like.dtype]


def _unflattened(chain: list[fx.Node], node: fx.Node, like: Tensor) -> fx.Node:
    """A sum, or its view with the stream's shape where the model adds in another shape, as OPT does."""
    following = chain[chain.index(node) + 1] if node is not chain[-1] else node
    is_view = following.target in (aten.view.default, aten.reshape.default)
    return following if is_view and following.meta["val"].shape == like.shape else node


def _behind(node: fx.Node, sums: list[fx.Node]) -> bool:
    """Whether a node comes after the first sum."""
    return bool(sums) and sums[0] < node
