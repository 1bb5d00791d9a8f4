"""A selection of calls as boxes and arrows, with what a reader wants to know of each box.

Sizes (`sym_size` and arithmetic on it) are left out: they say nothing that the shapes do not. What comes from
outside the selection is drawn as an input, and a quantized weight is one box with its scales and zero points.
"""

from collections.abc import Iterable, Mapping

import sympy
from torch import Tensor, fx

from graphwright.cost import VIEWS, NodeCost, node_costs
from graphwright.op import op_of
from graphwright.program import Program
from graphwright.report.data import Picture, PictureEdge, PictureNode
from graphwright.report.layer import Selection, writes
from graphwright.report.weights import PARTS, quantized_part
from graphwright.text import describe, op_name, symbol_names

CAPTURED = "capture"


def draw(program: Program, selection: Selection, sizes: Mapping[str, int]) -> Picture:
    """The picture of `selection`, with costs of a call at `sizes`."""
    return _Drawing(program, selection, sizes).picture()


class _Drawing:
    """What is known of the whole program, to describe single nodes with."""

    def __init__(self, program: Program, selection: Selection, sizes: Mapping[str, int]) -> None:
        self.program = program
        self.selection = selection
        self.sizes = dict(sizes)
        self.names = symbol_names(program.graph, program.contract)
        self.costs: dict[str, NodeCost] = {cost.node: cost for cost in node_costs(program)}
        self.bound = {sympy.Symbol(n, positive=True, integer=True): s for n, s in sizes.items()}
        lines = iter(program.text(shapes=False).splitlines())
        self.lines = {node: next(lines) for node in program.graph.nodes if node.op != "get_attr"}

    def picture(self) -> Picture:
        """Boxes in execution order, weights and inputs first."""
        inside = [node for node in self.selection.nodes if _shown(node)]
        known = set(inside)
        feeding = [(source, node) for node in inside for source in node.all_input_nodes if source not in known]
        outside = dict.fromkeys(s for s, n in feeding if _shown(s) and quantized_part(s, n) not in PARTS.values())
        boxes = {*inside, *outside}
        return Picture(
            title=self.selection.title,
            sizes=self.sizes,
            nodes=[*(self._outer(node) for node in outside), *(self._call(node) for node in inside)],
            edges=[*_data_edges(inside, boxes), *_order_edges(self.program, set(inside))],
        )

    def _call(self, node: fx.Node) -> PictureNode:
        cost = self.costs[node.name]
        name = op_name(node.target).partition(".")[0]
        semantic = op_of(node.target) is not None
        return PictureNode(
            id=node.name,
            label=name,
            kind="semantic" if semantic else "view" if name in VIEWS else "aten",
            text=self.lines[node],
            shape=self._shape(node),
            origin=str(node.meta.get("origin", CAPTURED)),
            flops=float(cost.flops.subs(self.bound)),
            cost_bytes=float(cost.bytes.subs(self.bound)),
            cost=f"{cost.flops} FLOP, {cost.bytes} bytes",
        )

    def _outer(self, node: fx.Node) -> PictureNode:
        is_weight = node.op == "get_attr"
        if node is self.selection.start:
            label = "from the layer before"
        elif is_weight:
            label = ".".join(str(node.target).split(".")[-2:])
        else:
            label = str(node.target) if node.op == "placeholder" else op_name(node.target).partition(".")[0]
        parts = [node, *_other_parts(node)] if is_weight else []
        return PictureNode(
            id=node.name,
            label=label,
            kind="weight" if is_weight else "input",
            text=", ".join(str(part.target) for part in parts) if is_weight else self.lines[node],
            shape=self._shape(node),
            origin=str(node.meta.get("origin", CAPTURED)),
            flops=0.0,
            cost_bytes=float(sum(self.program.weight(part).nbytes for part in parts)),
            cost="",
        )

    def _shape(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        return "" if value is None else describe(value, self.names)


def _other_parts(codes: fx.Node) -> list[fx.Node]:
    """The scales and zero points that belong to these codes; they are shown in the same box."""
    return [
        source
        for user in codes.users
        if quantized_part(codes, user)
        for source in user.all_input_nodes
        if source.op == "get_attr" and quantized_part(source, user) in PARTS.values()
    ]


def _shown(node: fx.Node) -> bool:
    """Whether the node's value is data; a write in place has no value and is shown too."""
    value = node.meta.get("val")
    return node.op == "get_attr" or value is None or isinstance(value, (Tensor, list, tuple))


def _data_edges(inside: Iterable[fx.Node], boxes: set[fx.Node]) -> list[PictureEdge]:
    return [
        PictureEdge(source=source.name, target=node.name, kind="data")
        for node in inside
        for source in node.all_input_nodes
        if source in boxes
    ]


def _order_edges(program: Program, inside: set[fx.Node]) -> list[PictureEdge]:
    return [
        PictureEdge(source=writer.name, target=reader.name, kind="order")
        for writer, reader in writes(program)
        if writer in inside and reader in inside
    ]
