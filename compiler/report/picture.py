"""The layout of a picture: boxes in rows by depth, few crossings, straight arrows (Sugiyama et al. 1981).

    placed = layout(report.pictures["after"])
    for box in placed.boxes: draw(box.x, box.y, box.width, box.height)

Rows follow the longest path from a source; weights and inputs stand in the row just above their first reader. An arrow
that spans several rows passes each on a place of its own. Rows are ordered by barycentres, and the places within a
row are the least-squares solution that keeps order and distances (isotonic regression).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx

from graphwright.report.data import Picture, PictureNode

Key = str | tuple[int, int]
"""A box by its id, or (arrow, row) for a place where an arrow passes a row."""

SWEEPS = 12
GAP_X, GAP_Y, MARGIN = 16.0, 24.0, 12.0
LABEL_WIDTH, DETAIL_WIDTH, PADDING = 7.7, 6.6, 18.0
TALL, SHORT = 38.0, 22.0
PASSING_WIDTH = 6.0
MAX_LABEL = 26


@dataclass(frozen=True)
class Box:
    """One node's rectangle; x and y are its left upper corner."""

    node: PictureNode
    label: str
    detail: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Arrow:
    """One edge as an SVG path."""

    source: str
    target: str
    kind: str
    path: str


@dataclass(frozen=True)
class Layout:
    """Where everything stands."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


SHORT_NAMES = {
    "float32": "f32 ", "float16": "f16 ", "bfloat16": "bf16 ", "float64": "f64 ", "int64": "i64 ", "int32": "i32 ",
    "int8": "i8 ", "uint8": "u8 ", "bool": "bool ", "batch": "B", "target_sequence": "Q", "sequence": "S",
    "keys": "T", "capacity": "C", "logits": "L",
}  # fmt: skip


def short_shape(shape: str) -> str:
    """`f32 [B, 4, S, 16]` for `float32[batch, 4, sequence, 16]`."""
    dtype, bracket, rest = shape.partition("[")
    for name in ("target_sequence", "batch", "sequence", "keys", "capacity", "logits"):
        rest = rest.replace(name, SHORT_NAMES[name])
    return f"{SHORT_NAMES.get(dtype, dtype)}{bracket}{rest}" if bracket else shape


def layout(picture: Picture) -> Layout:
    """Places every box and arrow of `picture`."""
    nodes = {node["id"]: node for node in picture["nodes"]}
    if not nodes:
        return Layout(0.0, 0.0, (), ())
    labels = {key: _labels(node) for key, node in nodes.items()}
    edges = list(dict.fromkeys((e["source"], e["target"], e["kind"]) for e in picture["edges"]))
    depth = _depths(nodes, [(s, t) for s, t, _ in edges])
    graph, chains = _with_passings(nodes, edges, depth)
    rows = _ordered_rows(graph)
    sizes = {key: _size(nodes[key], labels[key]) if isinstance(key, str) else (PASSING_WIDTH, 0.0) for key in graph}
    centre = _places(graph, rows, {key: size[0] for key, size in sizes.items()})
    left = min(centre[key] - sizes[key][0] / 2 for key in graph) - MARGIN
    tops = _tops(rows, sizes)
    boxes = {
        key: Box(
            node,
            *labels[key],
            x=centre[key] - left - sizes[key][0] / 2,
            y=tops[depth[key]][0] + (tops[depth[key]][1] - sizes[key][1]) / 2,
            width=sizes[key][0],
            height=sizes[key][1],
        )
        for key, node in nodes.items()
    }
    points = {key: centre[key] - left for key in graph}
    width = max(box.x + box.width for box in boxes.values())
    width = max(width, *points.values()) + MARGIN
    height = sum(tops[-1]) + MARGIN
    return Layout(width, height, tuple(boxes.values()), tuple(_arrows(edges, chains, boxes, points, tops)))


def _labels(node: PictureNode) -> tuple[str, str]:
    label = node["label"] if len(node["label"]) <= MAX_LABEL else f"{node['label'][: MAX_LABEL - 1]}…"
    detail = "" if node["kind"] == "view" else short_shape(node["shape"])
    return label, detail if len(detail) <= MAX_LABEL else f"{detail[: MAX_LABEL - 1]}…"


def _size(node: PictureNode, labels: tuple[str, str]) -> tuple[float, float]:
    width = max(len(labels[0]) * LABEL_WIDTH, len(labels[1]) * DETAIL_WIDTH) + PADDING
    return width, TALL if labels[1] else SHORT


def _depths(nodes: dict[str, PictureNode], edges: Sequence[tuple[str, str]]) -> dict[Key, int]:
    """Rows by longest path; sources as late as their first reader allows."""
    graph: networkx.DiGraph[str] = networkx.DiGraph(edges)
    graph.add_nodes_from(nodes)
    depth: dict[Key, int] = {}
    for key in networkx.topological_sort(graph):
        depth[key] = max((depth[source] + 1 for source in graph.predecessors(key)), default=0)
    for key in nodes:
        if not graph.in_degree(key) and graph.out_degree(key):
            depth[key] = min(depth[reader] for reader in graph.successors(key)) - 1
    lowest = min(depth.values())
    return {key: row - lowest for key, row in depth.items()}


def _with_passings(
    nodes: dict[str, PictureNode], edges: Sequence[tuple[str, str, str]], depth: dict[Key, int]
) -> tuple["networkx.DiGraph[Key]", list[list[Key]]]:
    """The graph in which every edge joins neighbouring rows, and each arrow's way through it."""
    graph: networkx.DiGraph[Key] = networkx.DiGraph()
    for key in sorted(nodes, key=lambda k: depth[k]):
        graph.add_node(key, row=depth[key])
    chains = []
    for index, (source, target, _) in enumerate(edges):
        passings: list[Key] = [(index, row) for row in range(depth[source] + 1, depth[target])]
        for passing in passings:
            graph.add_node(passing, row=passing[1])
        chain: list[Key] = [source, *passings, target]
        networkx.add_path(graph, chain)
        chains.append(chain)
    return graph, chains


def _ordered_rows(graph: "networkx.DiGraph[Key]") -> list[list[Key]]:
    """Rows in the order with the fewest crossings that barycentre sweeps find."""
    count = 1 + max(int(graph.nodes[key]["row"]) for key in graph)
    rows: list[list[Key]] = [[] for _ in range(count)]
    for key in networkx.dfs_preorder_nodes(graph.to_undirected(as_view=True)):
        rows[graph.nodes[key]["row"]].append(key)
    for key in graph:
        if key not in rows[graph.nodes[key]["row"]]:
            rows[graph.nodes[key]["row"]].append(key)
    best, fewest = rows, _crossings(graph, rows)
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        rows = _sweep(graph, rows, downwards)
        crossings = _crossings(graph, rows)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _sweep(graph: "networkx.DiGraph[Key]", rows: list[list[Key]], downwards: bool) -> list[list[Key]]:
    neighbours: Callable[[Key], Iterable[Key]] = graph.predecessors if downwards else graph.successors
    rows = [list(row) for row in rows]
    for index in range(1, len(rows)) if downwards else range(len(rows) - 2, -1, -1):
        fixed = rows[index - 1 if downwards else index + 1]
        rank = {key: place for place, key in enumerate(fixed)}
        current = {key: place * len(fixed) / len(rows[index]) for place, key in enumerate(rows[index])}
        rows[index].sort(key=lambda key: _mean([rank[n] for n in neighbours(key)], current[key]))
    return rows


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(graph: "networkx.DiGraph[Key]", rows: list[list[Key]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        rank = {key: place for place, key in enumerate(lower)}
        ends = [rank[reader] for key in upper for reader in sorted(graph.successors(key), key=rank.__getitem__)]
        total += sum(1 for i, one in enumerate(ends) for other in ends[i + 1 :] if one > other)
    return total


def _places(graph: "networkx.DiGraph[Key]", rows: list[list[Key]], width: dict[Key, float]) -> dict[Key, float]:
    """The centre of every place, drawn to its neighbours and kept in order."""
    place = {key: float(index) for row in rows for index, key in enumerate(row)}
    for row in rows:
        _pack(row, width, place, {key: place[key] for key in row}, dict.fromkeys(row, 1.0))
    for sweep in range(4 * SWEEPS):
        both = sweep >= 2 * SWEEPS
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted, weight = {}, {}
            for key in row:
                above, below = list(graph.predecessors(key)), list(graph.successors(key))
                near = above + below if both else (above or below) if sweep % 2 == 0 else (below or above)
                pull = [8.0 if isinstance(key, tuple) and isinstance(n, tuple) else 1.0 for n in near]
                total = sum(pull)
                wanted[key] = sum(place[n] * p for n, p in zip(near, pull, strict=True)) / total if total else 0.0
                weight[key] = max(total, 0.01)
            _pack(row, width, place, wanted, weight)
    return place


def _pack(
    row: list[Key], width: dict[Key, float], place: dict[Key, float], wanted: dict[Key, float], weight: dict[Key, float]
) -> None:
    """Writes the places nearest to `wanted` that keep the order and the gaps (pool adjacent violators)."""
    offset, offsets = 0.0, []
    for previous, key in zip([None, *row], row, strict=False):
        if previous is not None:
            offset += (width[previous] + width[key]) / 2 + GAP_X
        offsets.append(offset)
    blocks: list[tuple[float, float, int]] = []
    for key, shift in zip(row, offsets, strict=True):
        value, mass, count = wanted[key] - shift, weight[key], 1
        while blocks and blocks[-1][0] >= value:
            other, other_mass, other_count = blocks.pop()
            value = (value * mass + other * other_mass) / (mass + other_mass)
            mass, count = mass + other_mass, count + other_count
        blocks.append((value, mass, count))
    values = [value for value, _, count in blocks for _ in range(count)]
    for key, value, shift in zip(row, values, offsets, strict=True):
        place[key] = value + shift


def _tops(rows: list[list[Key]], sizes: dict[Key, tuple[float, float]]) -> list[tuple[float, float]]:
    """Upper edge and height of every row."""
    tops, y = [], MARGIN
    for row in rows:
        height = max(sizes[key][1] for key in row)
        tops.append((y, height))
        y += height + GAP_Y
    return tops


def _arrows(
    edges: Sequence[tuple[str, str, str]],
    chains: Sequence[Sequence[Key]],
    boxes: dict[str, Box],
    points: dict[Key, float],
    tops: list[tuple[float, float]],
) -> Iterable[Arrow]:
    """Smooth paths from the lower edge of one box through its passings to the upper edge of another."""
    ports = _ports(chains, boxes, points)
    for index, ((source, target, kind), chain) in enumerate(zip(edges, chains, strict=True)):
        x, y = ports[index, "out"], boxes[source].y + boxes[source].height
        path = f"M{x:.1f},{y:.1f}"
        for key in chain[1:-1]:
            top, height = tops[key[1]] if isinstance(key, tuple) else (0.0, 0.0)
            path += _curve(x, y, points[key], top) + f"V{top + height:.1f}"
            x, y = points[key], top + height
        path += _curve(x, y, ports[index, "in"], boxes[target].y)
        yield Arrow(source, target, kind, path)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (y + to_y) / 2
    return f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"


def _ports(
    chains: Sequence[Sequence[Key]], boxes: dict[str, Box], points: dict[Key, float]
) -> dict[tuple[int, str], float]:
    """Where each arrow leaves and enters its boxes: side by side, in the order in which the arrows come."""
    ports: dict[tuple[int, str], float] = {}
    for side, end, next_to in (("out", 0, 1), ("in", -1, -2)):
        by_box: dict[Key, list[int]] = {}
        for index, chain in enumerate(chains):
            by_box.setdefault(chain[end], []).append(index)
        for key, arrows in by_box.items():
            arrows.sort(key=lambda index: points[chains[index][next_to]])
            step = min(14.0, boxes[str(key)].width * 0.6 / len(arrows))
            for place, index in enumerate(arrows):
                ports[index, side] = points[key] + (place - (len(arrows) - 1) / 2) * step
    return ports
