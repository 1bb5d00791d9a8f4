"""Mixtures of experts: routing, sorting tokens by expert, and products with the weights of chosen experts.

    weights, indices = route(logits)
    order, starts, active = sort_choices(indices)        a counting sort
    inner[p]  = act(x[order[p] // top_k] · up[expert])   for the places p of each active expert
    outer[order[p]] = inner[p] · down[expert]
    y[m] = sum over j of weights[m, j] * outer[m * top_k + j]

Weights of an expert that nobody chose are not read. Threads share the columns of the weights, each for all active
experts, so that an expert with many tokens keeps no thread waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Flat,
    Index,
    T,
    kernel,
    let,
    local,
    loop,
    parallel,
    spread,
    widest,
)
from graphwright.kernels.tir.float_linear import Operands, each_block, one_row, panel, products, rows_at_once
from graphwright.kernels.tir.functions import exp
from graphwright.kernels.tir.linear import Epilogue, Linear, Weight

FEW_ROWS = 2
"""Rows of one expert for which its weights are decoded in registers, once for each row."""

TAKEN, EXCLUDED = -3.4e38, -3.3e38
"""What stands in the place of a score that was chosen, or that may not be; both are below every score."""


@dataclass(frozen=True)
class Routing:
    """A router; see `graphwright.ops.moe_routing`."""

    num_experts: int
    top_k: int
    scoring: str
    normalize: bool
    scaling: float
    num_groups: int
    top_groups: int
    corrected: bool


def route(routing: Routing, rows: Index) -> tirx.PrimFunc:
    """Logits [rows, E], and the correction bias [E] if there is one, to weights float32 and indices int64 [rows, k]."""
    count, top_k = routing.num_experts, routing.top_k
    with kernel("moe_routing") as k:
        logits = k.read("logits", (rows, count), "float32")
        bias = k.read("bias", (count,), "float32") if routing.corrected else None
        weights, indices = k.write("weights", (rows, top_k), "float32"), k.write("indices", (rows, top_k), "int64")
        k.begin()
        with parallel(rows) as row:
            scores, ranked = local(count, "float32"), local(count, "float32")
            _score(routing, logits, row, scores)
            with loop(count) as e:
                ranked.put(e, scores[e] + bias[e] if bias else scores[e], 1)
            if routing.num_groups > 1:
                _keep_best_groups(routing, ranked)
            total = _cell(0.0)
            with loop(top_k) as j:
                best = _take_best(ranked, 0, count)
                indices.put(row * top_k + j, tirx.Cast("int64", best[0]), 1)
                weights.put(row * top_k + j, scores[best[0]], 1)
                total.put(0, total[0] + scores[best[0]], 1)
            scale = tirx.const(routing.scaling, "float32")
            if routing.normalize:
                scale = scale / T.max(total[0], tirx.const(1.2e-38, "float32"))
            factor = let(scale)
            with loop(top_k) as j:
                weights.put(row * top_k + j, weights[row * top_k + j] * factor, 1)
    return k.function


def _cell(value: float, dtype: str = "float32") -> Flat:
    """A variable."""
    made = local(1, dtype)
    made.put(0, tirx.const(value, dtype), 1)
    return made


def _score(routing: Routing, logits: Flat, row: Any, scores: Flat) -> None:
    count = routing.num_experts
    first = let(row * count)
    if routing.scoring == "sigmoid":
        with loop(count) as e:
            scores.put(e, tirx.const(1.0, "float32") / (exp(-logits[first + e], 1) + tirx.const(1.0, "float32")), 1)
        return
    peak, total = _cell(TAKEN), _cell(0.0)
    with loop(count) as e:
        peak.put(0, T.max(peak[0], logits[first + e]), 1)
    with loop(count) as e:
        scores.put(e, exp(logits[first + e] - peak[0], 1), 1)
        total.put(0, total[0] + scores[e], 1)
    with loop(count) as e:
        scores.put(e, scores[e] / total[0], 1)


def _take_best(values: Flat, first: Any, count: int) -> Flat:
    """The place of the largest of some values, which is then struck out; the first of equal ones."""
    place, peak = _cell(0, "int32"), _cell(TAKEN)
    with loop(count) as i:
        at = let(first + i)
        with T.If(values[at] > peak[0]), T.Then():
            peak.put(0, values[at], 1)
            place.put(0, tirx.Cast("int32", at), 1)
    values.put(place[0], tirx.const(TAKEN, "float32"), 1)
    return place


def _keep_best_groups(routing: Routing, ranked: Flat) -> None:
    """Strikes out the experts of all but the best groups."""
    groups, size = routing.num_groups, routing.num_experts // routing.num_groups
    counted = min(2, size) if routing.corrected else 1
    worth, kept, left = local(groups, "float32"), local(groups, "int32"), local(routing.num_experts, "float32")
    with loop(routing.num_experts) as e:
        left.put(e, ranked[e], 1)
    with loop(groups) as g:
        kept.put(g, tirx.const(0, "int32"), 1)
        worth.put(g, tirx.const(0.0, "float32"), 1)
        with loop(counted):
            best = _take_best(left, let(g * size), size)
            worth.put(g, worth[g] + ranked[best[0]], 1)
    with loop(routing.top_groups):
        kept.put(_take_best(worth, 0, groups)[0], tirx.const(1, "int32"), 1)
    with loop(routing.num_experts) as e, T.If(kept[e // size] == 0), T.Then():
        ranked.put(e, tirx.const(EXCLUDED, "float32"), 1)


def sort_choices(tokens: Index, top_k: int, choices: Index, num_experts: int) -> tirx.PrimFunc:
    """Indices int64 [tokens, top_k], of which there are `choices`, to order, starts and active, all int32.

    `order` [choices] has the choices sorted by expert, and `starts` [E + 1] where each expert's begin in it. `active`
    [E + 1] has the number of experts that somebody chose, and then these.
    """
    one = tirx.const(1, "int32")
    with kernel("sort_choices") as k:
        indices = k.read("indices", (tokens, top_k), "int64")
        order = k.write("order", (choices,), "int32")
        starts = k.write("starts", (num_experts + 1,), "int32")
        active = k.write("active", (num_experts + 1,), "int32")
        k.begin()
        next_ = local(num_experts, "int32")
        with loop(num_experts) as e:
            next_.put(e, tirx.const(0, "int32"), 1)
        with loop(choices) as i:
            next_.put(indices[i], next_[indices[i]] + one, 1)
        active.put(0, tirx.const(0, "int32"), 1)
        starts.put(0, tirx.const(0, "int32"), 1)
        with loop(num_experts) as e:
            count = let(next_[e])
            with T.If(count > 0), T.Then():
                active.put(0, active[0] + one, 1)
                active.put(active[0], tirx.Cast("int32", e), 1)
            next_.put(e, starts[e], 1)
            starts.put(e + 1, starts[e] + count, 1)
        with loop(choices) as i:
            place = let(next_[indices[i]])
            order.put(place, tirx.Cast("int32", i), 1)
            next_.put(indices[i], place + one, 1)
    return k.function


def expert_linear(
    layer: Linear, num_experts: int, rows: Sequence[Index], choices: Index, top_k: int, lanes: int
) -> tirx.PrimFunc:
    """One product of every active expert with x [*rows]: rows, and floats in each, of which the first K count.

    With `top_k`, rows are gathered: x has one for each token, and the output is in sorted order. Without (0), x is in
    sorted order, and the output in the order of choices.
    """
    with kernel("experts_up" if top_k else "experts_down") as k:
        x = k.read("x", rows, "float32")
        weight = Weight(k, layer, num_experts)
        order = k.read("order", (choices,), "int32")
        starts = k.read("starts", (num_experts + 1,), "int32")
        active = k.read("active", (num_experts + 1,), "int32")
        epilogue = Epilogue(k, layer, (choices,), num_experts)
        k.begin()
        b = Operands(layer, x, weight)
        count = let(tirx.Cast("int64", active[0]))
        with parallel(let(count * layer.columns)) as task:
            expert = let(tirx.Cast("int64", active[1 + task % count]))
            chosen = layer.tiles_of(let(task // count))
            stored = [let(expert * layer.tiles + tile) for tile in chosen]
            first = let(tirx.Cast("int64", starts[expert]))
            taken = let(tirx.Cast("int64", starts[expert + 1]) - first)

            def source(place: Any) -> Any:
                return let((tirx.Cast("int64", order[place]) // top_k if top_k else place) * rows[1])

            def finish(place: Any, sums: list[Flat]) -> None:
                row = place if top_k else let(tirx.Cast("int64", order[place]))
                epilogue.finish(row, chosen, sums, lanes, expert=expert)

            def block(panels: list[tuple[Flat, Any]], places: list[Any]) -> None:
                for place, line in zip(places, products(b, [source(p) for p in places], panels, lanes), strict=True):
                    finish(place, line)

            with T.If(taken <= FEW_ROWS):
                with T.Then(), loop(taken) as row:
                    place = let(first + row)
                    start = source(place)
                    finish(place, [one_row(b, start, tile, lanes) for tile in stored])
                with T.Else():
                    panels = [panel(b, tile, lanes) for tile in stored]
                    many = rows_at_once(lanes, len(chosen))
                    each_block(first, taken, many, lambda places: block(panels, places))
    return k.function


def combine(tokens: Index, choices: Index, top_k: int, width: int) -> tirx.PrimFunc:
    """Outputs of all choices [choices, width] and weights [tokens, top_k] to [tokens, width]."""
    lanes = widest(width)
    with kernel("experts_combine") as k:
        outer = k.read("outer", (choices, width), "float32")
        weights = k.read("weights", (tokens, top_k), "float32")
        out = k.write("out", (tokens, width), "float32")
        k.begin()
        with parallel(tokens) as row, loop(width // lanes) as i:
            total = tirx.const(0.0, "float32") if lanes == 1 else tirx.Broadcast(tirx.const(0.0, "float32"), lanes)
            for j in range(top_k):
                at = let(row * top_k + j)
                total = total + outer.vec(at * width + i * lanes, lanes) * spread(weights[at], lanes)
            out.put(row * width + i * lanes, total, lanes)
    return k.function
