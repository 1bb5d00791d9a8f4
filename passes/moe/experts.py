"""Gathering a mixture of experts in two ops, whatever its spelling.

    before                                                after
    weights, ids = topk(softmax(logits), k) …             weights, ids = moe_routing(logits, None, k, "softmax", True)
    rows = x[sort(ids) // k]                              y = experts(x, weights, ids, up, None, down, None, "silu")
    h = silu(grouped_linear(rows, gate)) * …
    y = sum(grouped_linear(h, down) * weights, 1)

Found are products of sorted rows with stacked weights (`grouped_linear`) and of rows with gathered weights (index and
bmm). What a subgraph means is decided by evaluating it: the middle of the MLP against the known activations, the
router against every combination of scoring, groups and normalization, and the whole against the op. A router that
fits none stays as it is, before the `experts` op, and is reported.

It runs after passes that fold scales or rotations into the weights of experts, and before quantization.
"""

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.numerics import EXACT_TOLERANCE, relative_error
from graphwright.ops import experts, grouped_linear, moe_routing
from graphwright.ops.experts import CLAMPED_SWIGLU, activate
from graphwright.ops.gated_activation import ACTIVATIONS
from graphwright.ops.moe_routing import SCORING
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor, run_nodes

aten = torch.ops.aten


class Experts(Pass):
    """Finds routers and expert MLPs."""

    name = "experts"
    kind = "exact"
    paper = Paper("MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", "Gale et al.", 2022, "2211.15841")
    requires = ("grouped_linear", "gated_activation", "linear")
    after = ("folded", "float_dtype")
    provides = ("experts",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every mixture of experts that is understood; the rest is told with the reason."""
        misses: list[str] = []
        with Editor(program, self.name, context.fuel) as editor:
            for total in program.calls(aten.sum.dim_IntList):
                layer = _layer(total)
                if layer is None:
                    continue
                try:
                    mlp = _understood(program, layer, context.generator())
                except _UnknownError as reason:
                    misses.append(f"the experts at {total.name}: {reason}")
                    continue
                if not editor.allow(total):
                    break
                _install(editor, layer, mlp)
                try:
                    routing = _routing(program, layer, context.generator())
                except _UnknownError as reason:
                    misses.append(f"the router of {layer.up.name}: {reason}; it stays as it is")
                    continue
                if editor.allow(layer.indices):
                    _install_routing(editor, layer, routing)
        return PassResult(program, editor.sites, near_misses=misses)


class _UnknownError(Exception):
    """Why a subgraph is not understood."""


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


@dataclass(frozen=True)
class Mlp:
    """What the experts of a layer compute."""

    up: Tensor
    up_bias: fx.Node | None
    down: Tensor
    down_bias: fx.Node | None
    activation: str
    gated: bool
    interleaved: bool
    alpha: float = 1.0
    limit: float = 0.0


# Finding


def _layer(total: fx.Node) -> Layer | None:
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
            if _selects(stacked):
                flipped = stacked is not weight
                return Product(node, rows, stacked.args[0], stacked.args[1][0], outputs_first != flipped)
    return None


def _selects(node: Any) -> bool:
    """Whether a call picks entries of a weight along its first dimension."""
    if not isinstance(node, fx.Node) or node.target is not aten.index.Tensor:
        return False
    return _source(node).op == "get_attr" and len(node.args[1]) == 1


def _source(node: fx.Node) -> fx.Node:
    """The first argument."""
    return cast(fx.Node, node.args[0])


def _unflipped(weight: fx.Node) -> fx.Node:
    """What a transpose of the last two dimensions reads; the node itself if it is none."""
    if weight.target is aten.transpose.int and {a % 3 for a in weight.args[1:3]} == {1, 2}:
        return _source(weight)
    if weight.target is aten.permute.default and list(weight.args[1]) == [0, 2, 1]:
        return _source(weight)
    return weight


def _tokens(rows: fx.Node) -> fx.Node | None:
    """What rows are gathered from, one for each choice."""
    while rows.target is aten.unsqueeze.default:
        rows = _source(rows)
    return _source(rows) if rows.target in (aten.index.Tensor, aten.repeat_interleave.self_int) else None


def _share(stacked: fx.Node) -> fx.Node | None:
    """The weights that outputs are multiplied by before they are summed."""
    node = stacked
    while node.target in (aten.reshape.default, aten.view.default, aten.index.Tensor, aten.to.dtype):
        node = _source(node)
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    left, right = cast(tuple[fx.Node, fx.Node], node.args[:2])
    return right if right.meta["val"].shape[-1] == 1 else left


def _reach(node: fx.Node, tokens: Any, choices: Any) -> fx.Node | None:
    """The first matrix [tokens, choices] behind a chain of calls that read one tensor each."""
    while node.target is aten.unsqueeze.default:
        node = _source(node)  # With one choice per token, a column of sorted rows looks like the matrix.
    while node.op == "call_function":
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dim() == 2 and str(value.shape) == str(torch.Size((tokens, choices))):
            return node
        sources = [n for n in node.args if isinstance(n, fx.Node) and not isinstance(n.meta["val"], torch.SymInt)]
        if not sources:
            return None
        node = sources[0]
    return None


# Understanding


def _understood(program: Program, layer: Layer, generator: torch.Generator) -> Mlp:
    """The meaning of a layer, checked as a whole."""
    raw, up_bias = _biased(layer.up.node)
    _, down_bias = _biased(layer.down.node)
    activation, gated, interleaved, alpha, limit = _activation(program, raw, layer.down.rows, generator)
    up, down = (_outputs_first(program, p) for p in (layer.up, layer.down))
    if up.shape[0] != down.shape[0]:
        raise _UnknownError(f"{up.shape[0]} weights go in and {down.shape[0]} come out")
    choices = int(layer.indices.meta["val"].shape[1])
    if choices > up.shape[0]:
        raise _UnknownError(f"each token chooses {choices} of {up.shape[0]} experts")
    mlp = Mlp(up, up_bias, down, down_bias, activation, gated, interleaved, alpha, limit)
    sizes = _Sizes(layer.x.meta["val"].shape[0])
    x = torch.randn(sizes.tokens, layer.x.meta["val"].shape[1], generator=generator).to(layer.x.meta["val"].dtype)
    indices = torch.rand(sizes.tokens, up.shape[0], generator=generator).argsort(-1)[:, :choices]
    shares = torch.rand(indices.shape, generator=generator).to(layer.weights.meta["val"].dtype)
    bound = {layer.x: x, layer.weights: shares, layer.indices: indices}
    expected = _evaluate(program, [layer.total], sizes.bind(layer.total, bound))[0]
    stored = _tensors(program, mlp)
    found = experts.reference(x, shares, indices, *stored, activation, gated, alpha, limit)
    if relative_error(found.to(expected.dtype), expected) > EXACT_TOLERANCE[x.dtype]:
        raise _UnknownError("it does something else between its products and the sum")
    return mlp


def _tensors(program: Program, mlp: Mlp) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    up_bias, down_bias = (None if b is None else program.weight(b) for b in (mlp.up_bias, mlp.down_bias))
    if mlp.interleaved:
        up_bias = None if up_bias is None else _separated(up_bias)
        return _separated(mlp.up), up_bias, mlp.down, down_bias
    return mlp.up, up_bias, mlp.down, down_bias


def _separated(tensor: Tensor) -> Tensor:
    """Rows gate, up, gate, up … of dimension 1 with those of the gate first."""
    return torch.cat([tensor[:, ::2], tensor[:, 1::2]], 1)


def _outputs_first(program: Program, product: Product) -> Tensor:
    weight = program.weight(product.weight)
    return weight if product.outputs_first else weight.transpose(1, 2)


def _biased(product: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The end of a product with its bias, and what reads the bias or None."""
    node = product
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in (aten.squeeze.dim, aten.squeeze.dims, aten.reshape.default):
            node = user
            continue
        if user.target is aten.add.Tensor:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if _selects(other):
                return user, _source(cast(fx.Node, other))
        break
    return node, None


def _activation(
    program: Program, raw: fx.Node, end: fx.Node, generator: torch.Generator
) -> tuple[str, bool, bool, float, float]:
    """The elementwise middle: its name, whether it is gated, whether gate and up alternate, alpha and limit."""
    value = raw.meta["val"]
    sizes = _Sizes(value.shape[0])
    given = (torch.randn(sizes.tokens, int(value.shape[-1]), generator=generator) * 6).to(value.dtype)
    result = _evaluate(program, [end], sizes.bind(end, {raw: given}))[0].reshape(sizes.tokens, -1)
    numbers = _numbers(end, {raw})
    plain = [(name, gated, 1.0, 0.0) for name in ACTIVATIONS for gated in (True, False)]
    clamped = [(CLAMPED_SWIGLU, True, a, b) for a in numbers | {1.0} for b in numbers]
    for (name, gated, alpha, limit), interleaved in itertools.product((*plain, *clamped), (False, True)):
        if interleaved and not gated:
            continue
        ordered = torch.cat([given[:, ::2], given[:, 1::2]], 1) if interleaved else given
        if (gated and ordered.shape[1] % 2) or (given.shape[1] // 2 if gated else given.shape[1]) != result.shape[1]:
            continue
        if relative_error(activate(ordered, name, gated, alpha, limit), result) <= EXACT_TOLERANCE[value.dtype]:
            return name, gated, interleaved, alpha, limit
    raise _UnknownError("the activation between its products is none of the known ones")


def _between(end: fx.Node, stops: set[fx.Node]) -> Iterator[fx.Node]:
    seen, stack = set(stops), [end]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(node.all_input_nodes)


def _numbers(end: fx.Node, stops: set[fx.Node]) -> set[float]:
    """Positive constants that calls between two nodes take."""
    calls = [n for n in _between(end, stops) if n.op == "call_function" and n.target is not aten.slice.Tensor]
    constants = (a for node in calls for a in (*node.args, *node.kwargs.values()))
    return {float(a) for a in constants if type(a) in (int, float) and 0 < a < math.inf}


def _evaluate(program: Program, ends: list[fx.Node], bound: dict[fx.Node, Any]) -> list[Any]:
    try:
        return run_nodes(program, ends, bound)
    except PassError as error:
        raise _UnknownError(error.problem) from error


class _Sizes:
    """Numbers for the symbols in a subgraph's sizes; `tokens` is what one given size is then."""

    def __init__(self, size: Any, least: int = 5) -> None:
        self.symbols: dict[Any, int] = {}
        self.tokens = size
        if isinstance(size, torch.SymInt):
            free = sorted(size.node.expr.free_symbols, key=str)
            self.symbols = {symbol: least + 2 * place for place, symbol in enumerate(free)}
            self.tokens = int(size.node.expr.subs(self.symbols))

    def bind(self, end: fx.Node, bound: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """`bound` with the values of all size nodes behind `end`."""
        values = dict(bound)
        for node in _between(end, set(bound)):
            size = node.meta.get("val")
            if isinstance(size, torch.SymInt):
                values[node] = int(size.node.expr.subs(self.symbols))
        return values


# Routing


@dataclass(frozen=True)
class Routing:
    """Arguments of `moe_routing`."""

    logits: fx.Node
    correction_bias: fx.Node | None
    top_k: int
    scoring: str
    normalize: bool
    scaling: float
    num_groups: int
    top_groups: int


def _routing(program: Program, layer: Layer, generator: torch.Generator) -> Routing:
    """The router as one op, found by trying what it could be on random logits."""
    count = int(layer.up.weight.meta["val"].shape[0])
    nodes = [layer.weights, layer.indices]
    logits = _logits(nodes, count)
    between = {n for end in nodes for n in _between(end, {logits})}
    # Groups that only seldom change the choice show on many tokens alone.
    sizes = _Sizes(logits.meta["val"].shape[0], least=31)
    given = (torch.randn(sizes.tokens, count, generator=generator) * 2).to(logits.meta["val"].dtype)
    bound = sizes.bind(layer.weights, sizes.bind(layer.indices, {logits: given}))
    shares, chosen = _evaluate(program, nodes, bound)
    dense = _dense(shares, chosen, count)
    biases = [n for n in between if n.op == "get_attr" and tuple(n.meta["val"].shape) == (count,)]
    top_k = int(layer.indices.meta["val"].shape[1])
    numbers = sorted({1.0} | {n for end in nodes for n in _numbers(end, {logits})})
    for bias, groups, scoring, normalize, scaling in itertools.product(
        [None, *biases], _groups(between, count), SCORING, (False, True), numbers
    ):
        if top_k > count // groups[0] * groups[1]:
            continue
        stored = None if bias is None else program.weight(bias)
        shares, chosen = moe_routing.reference(given, stored, top_k, scoring, normalize, scaling, *groups)
        if relative_error(_dense(shares, chosen, count), dense) <= EXACT_TOLERANCE[given.dtype]:
            return Routing(logits, bias, top_k, scoring, normalize, scaling, *groups)
    raise _UnknownError("no known scoring, grouping and normalization gives its weights")


def _logits(ends: list[fx.Node], count: int) -> fx.Node:
    """The one linear layer with an output per expert that the routing comes from."""
    found, seen, stack = [], set(), list(ends)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.append(node)
        else:
            stack.extend(node.all_input_nodes)
    if len(found) != 1:
        raise _UnknownError(f"it reads {len(found)} linear layers")
    value = found[0].meta["val"]
    if value.dim() != 2 or value.shape[1] != count:
        raise _UnknownError(f"its logits are {tuple(value.shape)}, not one per expert and token")
    return found[0]


def _groups(between: set[fx.Node], count: int) -> list[tuple[int, int]]:
    """Groupings that shapes and top-k calls hint at: (groups, chosen groups)."""
    shapes = {tuple(v.shape[1:]) for n in between if isinstance(v := n.meta.get("val"), Tensor) and v.dim() == 3}
    numbers = {int(n.args[1]) for n in between if n.target is aten.topk.default}
    sizes = {int(s[0]) for s in shapes if all(isinstance(i, int) for i in s) and s[0] * s[1] == count and s[0] > 1}
    return [(1, 1), *((size, top) for size in sorted(sizes) for top in sorted(numbers) if top <= size)]


def _dense(weights: Tensor, indices: Tensor, count: int) -> Tensor:
    return torch.zeros(len(weights), count).scatter_add_(1, indices, weights.float())


# Editing


def _install(editor: Editor, layer: Layer, mlp: Mlp) -> None:
    program, before = editor.program, layer.total
    up, up_bias, down, down_bias = _tensors(program, mlp)

    def stored(product: Product, tensor: Tensor) -> fx.Node:
        if product.outputs_first and tensor is program.weight(product.weight):
            return editor.read(product.name, before)
        return editor.weight(f"{product.name}_experts", tensor.contiguous(), before)

    def bias(node: fx.Node | None, tensor: Tensor | None) -> fx.Node | None:
        if node is None or tensor is None:
            return None
        same = tensor is program.weight(node)
        name = str(node.target)
        return editor.read(name, before) if same else editor.weight(f"{name}_experts", tensor.contiguous(), before)

    first = (stored(layer.up, up), bias(mlp.up_bias, up_bias))
    second = (stored(layer.down, down), bias(mlp.down_bias, down_bias))
    rest = (mlp.activation, mlp.gated, mlp.alpha, mlp.limit)
    new = editor.call(experts, layer.x, layer.weights, layer.indices, *first, *second, *rest, before=before)
    dtype = layer.total.meta["val"].dtype
    if new.meta["val"].dtype != dtype:
        new = editor.call(aten.to.dtype, new, dtype, before=before)
    editor.replace(layer.total, new, layer.up.name)


def _install_routing(editor: Editor, layer: Layer, found: Routing) -> None:
    # Right behind the later of the two nodes, whose users all come after.
    order = {node: place for place, node in enumerate(editor.program.graph.nodes)}
    before = min(layer.weights, layer.indices, key=lambda node: order[node])
    bias = None if found.correction_bias is None else editor.read(str(found.correction_bias.target), before)
    rest = (found.top_k, found.scoring, found.normalize, found.scaling, found.num_groups, found.top_groups)
    both = editor.call(moe_routing, found.logits, bias, *rest, before=before)
    weights, indices = (editor.call(operator.getitem, both, place, before=before) for place in (0, 1))
    dtype = layer.weights.meta["val"].dtype
    if dtype is not torch.float32:
        weights = editor.call(aten.to.dtype, weights, dtype, before=before)
    layer.indices.replace_all_uses_with(indices)
    editor.replace(layer.weights, weights, "router")
