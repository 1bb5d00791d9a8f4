"""Finding mixtures of experts whose rows are sorted or whose weights are gathered: the nodes, not yet their meaning.

The end is a sum over choices; behind it stand two products with stacked weights, `grouped_linear` over sorted rows or
`bmm` with gathered weights, and what rows, weights of the choices and choices come from.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphwright.match import argument
from graphwright.ops import grouped_linear

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """Rows times one weight per expert.

    Attributes:
        node: the call.
        rows: its input, one row per token and choice.
        weight: reads the stacked weights.
        selector: from which the choice of experts comes.
        outputs_first: the weights are [E, N, K], not [E, K, N].
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    selector: fx.Node
    outputs_first: bool

    @property
    def name(self) -> str:
        """Name of the weights."""
        return str(self.weight.target)


@dataclass(frozen=True)
class Layer:
    """A mixture of experts in the graph: tokens `x`, the routing, both products, and the sum over choices."""

    x: fx.Node
    weights: fx.Node
    indices: fx.Node
    up: Product
    down: Product
    total: fx.Node


def find_layer(total: fx.Node) -> Layer | None:
    """The layer that ends in this sum, or None."""
    stacked = argument(total, "self")
    if stacked.meta["val"].dim() != 3 or list(argument(total, "dim") or ()) != [1] or argument(total, "keepdim"):
        return None
    found = _products(stacked)
    if len(found) != 2:
        return None
    down, up = found
    tokens, choices = total.meta["val"].shape[0], stacked.meta["val"].shape[1]
    x = _tokens(up.rows)
    indices = _reach(up.selector, tokens, choices)
    weights = _share(stacked)
    weights = None if weights is None else _reach(weights, tokens, choices)
    if x is None or indices is None or weights is None or indices.meta["val"].dtype is not torch.int64:
        return None
    return Layer(x, weights, indices, up, down, total)


def _products(end: fx.Node) -> list[Product]:
    """The products with stacked weights behind a node, the last one first."""
    found: list[Product] = []
    node = end
    while len(found) < 2:
        near = _nearest(node)
        if near is None:
            return found
        found.append(near)
        node = near.rows
    return found


def _nearest(end: fx.Node) -> Product | None:
    seen: set[fx.Node] = set()
    queue = [end]
    while queue:
        node = queue.pop(0)
        if node in seen or node.op != "call_function" or node.target is aten.linear.default:
            continue
        seen.add(node)
        made = _product(node)
        if made is not None:
            return made
        queue.extend(node.all_input_nodes)
    return None


def _product(node: fx.Node) -> Product | None:
    if node.target is grouped_linear.target:
        rows, weight, ends = node.args[:3]
        flipped = weight.op != "get_attr"
        weight = _unflipped(weight)
        return None if weight.op != "get_attr" else Product(node, rows, weight, ends, flipped)
    if node.target is aten.bmm.default:
        for weight, rows, outputs_first in ((*node.args[:2], True), (*reversed(node.args[:2]), False)):
            stacked = _unflipped(weight)
            if selects(stacked):
                flipped = stacked is not weight
                return Product(node, rows, stacked.args[0], stacked.args[1][0], outputs_first != flipped)
    return None


def selects(node: Any) -> bool:
    """Whether a call picks entries of a weight along its first dimension."""
    if not isinstance(node, fx.Node) or node.target is not aten.index.Tensor:
        return False
    return source(node).op == "get_attr" and len(node.args[1]) == 1


def source(node: fx.Node) -> fx.Node:
    """The first argument."""
    return cast(fx.Node, node.args[0])


def _unflipped(weight: fx.Node) -> fx.Node:
    """What a transpose of the last two dimensions reads; the node itself if it is none."""
    if weight.target is aten.transpose.int and {a % 3 for a in weight.args[1:3]} == {1, 2}:
        return source(weight)
    if weight.target is aten.permute.default and list(weight.args[1]) == [0, 2, 1]:
        return source(weight)
    return weight


def _tokens(rows: fx.Node) -> fx.Node | None:
    """What rows are gathered from, one for each choice."""
    while rows.target is aten.unsqueeze.default:
        rows = source(rows)
    return source(rows) if rows.target in (aten.index.Tensor, aten.repeat_interleave.self_int) else None


def _share(stacked: fx.Node) -> fx.Node | None:
    """The weights that outputs are multiplied by before they are summed."""
    node = stacked
    while node.target in (aten.reshape.default, aten.view.default, aten.index.Tensor, aten.to.dtype):
        node = source(node)
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    left, right = cast(tuple[fx.Node, fx.Node], node.args[:2])
    return right if right.meta["val"].shape[-1] == 1 else left


def _reach(node: fx.Node, tokens: Any, choices: Any) -> fx.Node | None:
    """The first matrix [tokens, choices] behind a chain of calls that read one tensor each."""
    while node.target is aten.unsqueeze.default:
        node = source(node)  # With one choice per token, a column of sorted rows looks like the matrix.
    while node.op == "call_function":
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dim() == 2 and str(value.shape) == str(torch.Size((tokens, choices))):
            return node
        sources = [n for n in node.args if isinstance(n, fx.Node) and not isinstance(n.meta["val"], torch.SymInt)]
        if not sources:
            return None
        node = sources[0]
    return None
