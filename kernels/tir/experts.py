"""Mixtures of experts: routing, sorting tokens by expert, and products with the weights of chosen experts.

    weights, indices = route(logits)
    order, starts, active = sort_choices(indices)        a counting sort
    inner[p]  = act(x[order[p] // top_k] · up[expert])   for the places p of each active expert
    outer[order[p]] = inner[p] · down[expert]
    y[m] = sum over j of weights[m, j] * outer[m * top_k + j]

Weights of an expert that nobody chose are not read. Threads share parts of the columns of the weights, each for all
active experts, so that an expert with many tokens keeps no thread waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
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
    minimum,
    parallel,
    product,
    spread,
    widest,
)
from graphwright.kernels.tir.float_linear import Operands, each_block, panel, products, rows_at_once, some_rows
from graphwright.kernels.tir.functions import exp
from graphwright.kernels.tir.linear import Epilogue, Linear, Weight

FEW_ROWS = 2
"""Rows of one expert for which its weights are decoded in registers, once for each row."""

MOST_UNROLLED = 16
"""Choices of a token whose sum is written out."""

SHARES = 8
"""Parts of the columns, at least, that threads share; each part goes through all experts."""

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
    mapped: bool = False
    skip_ratio: float = 0.0
    num_shared: int = 0
    first_shared: int = 0
    shared_weighted: bool = False

    @property
    def choices(self) -> int:
        """Experts of a token."""
        return self.top_k + self.num_shared


def route(routing: Routing, rows: Index) -> tirx.PrimFunc:
    """Logits [rows, E] to weights float32 and indices int64 [rows, J].

    Behind the logits come, where there are such, the correction bias [E], the stored number of each expert int64 [E],
    and the weight of the shared experts [rows, 1].
    """
    count, top_k, width = routing.num_experts, routing.top_k, routing.choices
    with kernel("moe_routing") as k:
        logits = k.read("logits", (rows, count), "float32")
        bias = k.read("bias", (count,), "float32") if routing.corrected else None
        stored = k.read("expert_of", (count,), "int64") if routing.mapped else None
        shared = k.read("shared_weight", (rows, 1), "float32") if routing.shared_weighted else None
        weights, indices = k.write("weights", (rows, width), "float32"), k.write("indices", (rows, width), "int64")
        k.begin()
        with parallel(rows) as row:
            scores, ranked = local(count, "float32"), local(count, "float32")
            _score(routing, logits, row, scores)
            with loop(count) as e:
                ranked.put(e, scores[e] + bias[e] if bias else scores[e], 1)
            if routing.num_groups > 1:
                _keep_best_groups(routing, ranked)
            start, peak = let(row * width), _cell(TAKEN)
            with loop(top_k) as j:
                best = _take_best(ranked, 0, count)
                number = let(stored[best[0]] if stored else tirx.Cast("int64", best[0]))
                indices.put(start + j, number, 1)
                weights.put(start + j, scores[best[0]], 1)
                peak.put(0, T.max(peak[0], scores[best[0]]), 1)
            if routing.skip_ratio > 0:
                _skip(weights, indices, start, top_k, let(peak[0] * tirx.const(routing.skip_ratio, "float32")))
            _scale(routing, weights, start)
            one = tirx.const(1.0, "float32")
            for j in range(routing.num_shared):
                indices.put(start + top_k + j, tirx.const(routing.first_shared + j, "int64"), 1)
                weights.put(start + top_k + j, shared[row] if shared else one, 1)
    return k.function


def _skip(weights: Flat, indices: Flat, start: Any, top_k: int, least: Any) -> None:
    """Leaves out choices with a smaller weight."""
    with loop(top_k) as j, T.If(weights[start + j] < least), T.Then():
        weights.put(start + j, tirx.const(0.0, "float32"), 1)
        indices.put(start + j, tirx.const(-1, "int64"), 1)


def _scale(routing: Routing, weights: Flat, start: Any) -> None:
    total = _cell(0.0)
    with loop(routing.top_k) as j:
        total.put(0, total[0] + weights[start + j], 1)
    scale = tirx.const(routing.scaling, "float32")
    if routing.normalize:
        scale = scale / T.max(total[0], tirx.const(1.2e-38, "float32"))
    factor = let(scale)
    with loop(routing.top_k) as j:
        weights.put(start + j, weights[start + j] * factor, 1)


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


@dataclass(frozen=True)
class Limit:
    """A capacity of experts: a number, or where that is 0 a multiple of equal shares."""

    num_experts: int
    capacity: int
    factor: Fraction
    round_up: bool

    def of(self, choices: Any) -> Any:
        """What an expert takes of so many choices."""
        if self.capacity:
            return let(tirx.const(self.capacity, "int64"))
        counted, shares = choices * self.factor.numerator, self.factor.denominator * self.num_experts
        return let(tirx.Cast("int64", tirx.floordiv(counted + (shares - 1 if self.round_up else 0), shares)))


def limit_choices(shape: Sequence[Index], limit: Limit) -> tirx.PrimFunc:
    """Weights and indices [*groups, tokens, J] without choices beyond the limit of a group's expert; what each lost.

    First choices of a group come before second ones, and earlier tokens before later ones.
    """
    *outer, tokens, top_k = shape
    groups, count = product(outer), limit.num_experts
    one, zero = tirx.const(1, "int64"), tirx.const(0, "int64")
    with kernel("expert_capacity") as k:
        weights, indices = k.read("weights", shape, "float32"), k.read("indices", shape, "int64")
        kept, chosen = k.write("kept", shape, "float32"), k.write("chosen", shape, "int64")
        dropped = k.write("dropped", (count,), "int64")
        k.begin()
        most, taken = limit.of(tokens * top_k), local(count, "int64")
        with loop(count) as e:
            dropped.put(e, zero, 1)
        with loop(groups) as group:
            with loop(count) as e:
                taken.put(e, zero, 1)
            with loop(top_k) as j, loop(tokens) as token:
                at = let((group * tokens + token) * top_k + j)
                expert = let(indices[at])
                kept.put(at, weights[at], 1)
                chosen.put(at, expert, 1)
                with T.If(expert >= zero), T.Then():
                    taken.put(expert, taken[expert] + one, 1)
                    with T.If(taken[expert] > most), T.Then():
                        kept.put(at, tirx.const(0.0, "float32"), 1)
                        chosen.put(at, tirx.const(-1, "int64"), 1)
                        dropped.put(expert, dropped[expert] + one, 1)
    return k.function


def choose_tokens(shape: Sequence[Index], limit: Limit) -> tirx.PrimFunc:
    """Logits [*groups, tokens, E] to weights and indices of that shape: each expert takes its best tokens of a group.

    The last output has room for the scores.
    """
    *outer, tokens, count = shape
    groups = product(outer)
    softmax = Routing(count, 1, "softmax", False, 1.0, 1, 1, False)
    with kernel("expert_choice") as k:
        logits = k.read("logits", shape, "float32")
        weights, indices = k.write("weights", shape, "float32"), k.write("indices", shape, "int64")
        scores = k.write("scores", shape, "float32")
        k.begin()
        most = let(T.max(limit.of(tokens), tirx.const(1, "int64")))
        with parallel(groups * tokens) as row:
            mine = local(count, "float32")
            _score(softmax, logits, row, mine)
            with loop(count) as e:
                scores.put(row * count + e, mine[e], 1)
        with parallel(groups * tokens) as row:
            first = let((row // tokens) * tokens)
            with loop(count) as e:
                at, better = let(row * count + e), _cell(0, "int64")
                with loop(tokens) as other:
                    theirs = let(scores[(first + other) * count + e])
                    earlier = tirx.And(theirs == scores[at], first + other < row)
                    with T.If(tirx.Or(theirs > scores[at], earlier)), T.Then():
                        better.put(0, better[0] + tirx.const(1, "int64"), 1)
                taken = let(better[0] < most)
                weights.put(at, T.if_then_else(taken, scores[at], tirx.const(0.0, "float32")), 1)
                indices.put(at, T.if_then_else(taken, tirx.Cast("int64", e), tirx.const(-1, "int64")), 1)
    return k.function


def sort_choices(tokens: Index, top_k: int, choices: Index, num_experts: int) -> tirx.PrimFunc:
    """Indices int64 [tokens, top_k], of which there are `choices`, to order, starts and active, all int32.

    `order` [choices] has the choices sorted by expert, and `starts` [E + 1] where each expert's begin in it. `active`
    [E + 1] has the number of experts that somebody chose, and then these. Choices of no expert, -1, are in none.
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
        with loop(choices) as i, T.If(indices[i] >= tirx.const(0, "int64")), T.Then():
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
        with loop(choices) as i, T.If(indices[i] >= tirx.const(0, "int64")), T.Then():
            place = let(next_[indices[i]])
            order.put(place, tirx.Cast("int32", i), 1)
            next_.put(indices[i], place + one, 1)
    return k.function


def columns_together(columns: int) -> int:
    """Columns of one expert that follow each other, so that its rows are still in the cache for the next one."""
    return max(d for d in range(1, max(1, columns // SHARES) + 1) if columns % d == 0)


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
        count = let(tirx.Cast("int64", active[0]))
        tasks, together = let(count * layer.columns), columns_together(layer.columns)

        def stored_tiles(task: Any) -> tuple[Any, list[Any], list[Any]]:
            """The expert of a task, the columns' tiles and where these are stored."""
            place = let(task % (count * together))
            expert = let(tirx.Cast("int64", active[1 + place // together]))
            chosen = layer.tiles_of(let(task // (count * together) * together + place % together))
            return expert, chosen, [let(expert * layer.tiles + tile) for tile in chosen]

        with parallel(tasks) as task:
            expert, chosen, stored = stored_tiles(task)
            _, _, next_ = stored_tiles(let(minimum(task + 1, tasks - 1)))
            b = Operands(layer, x, weight)
            # A task with many rows computes for long, and the next one's weights come meanwhile.
            many = replace(b, ahead=let((next_[0] - stored[0]) * weight.elements))
            first = let(tirx.Cast("int64", starts[expert]))
            taken = let(tirx.Cast("int64", starts[expert + 1]) - first)

            def source(place: Any) -> Any:
                return let((tirx.Cast("int64", order[place]) // top_k if top_k else place) * rows[1])

            def finish(place: Any, sums: list[Flat]) -> None:
                row = place if top_k else let(tirx.Cast("int64", order[place]))
                epilogue.finish(row, chosen, sums, lanes, expert=expert)

            def block(panels: list[tuple[Flat, Any]], places: list[Any]) -> None:
                for place, line in zip(places, products(many, [source(p) for p in places], panels, lanes), strict=True):
                    finish(place, line)

            with T.If(taken <= FEW_ROWS):
                with T.Then(), loop(taken) as row:
                    place = let(first + row)
                    start = source(place)
                    finish(place, [some_rows(b, [start], tile, lanes)[0] for tile in stored])
                with T.Else():
                    panels = [panel(many, tile, lanes) for tile in stored]
                    each_block(first, taken, rows_at_once(lanes, len(chosen)), lambda places: block(panels, places))
    return k.function


def combine(tokens: Index, choices: Index, top_k: int, width: int) -> tirx.PrimFunc:
    """Outputs of all choices [choices, width], weights and indices [tokens, top_k] to [tokens, width].

    Nothing was written for choices of no expert.
    """
    lanes = widest(width)
    with kernel("experts_combine") as k:
        outer = k.read("outer", (choices, width), "float32")
        weights = k.read("weights", (tokens, top_k), "float32")
        indices = k.read("indices", (tokens, top_k), "int64")
        out = k.write("out", (tokens, width), "float32")
        k.begin()
        nothing = spread(tirx.const(0.0, "float32"), lanes)

        def part(at: Any, column: Any) -> Any:
            product = outer.vec(at * width + column, lanes) * spread(weights[at], lanes)
            return T.if_then_else(indices[at] >= tirx.const(0, "int64"), product, nothing)

        with parallel(tokens) as row, loop(width // lanes) as i:
            column = let(i * lanes)
            if top_k <= MOST_UNROLLED:
                total = nothing
                for j in range(top_k):
                    total = total + part(let(row * top_k + j), column)
                out.put(row * width + column, total, lanes)
            else:
                sums = local(lanes, "float32")
                sums.put(0, nothing, lanes)
                with loop(top_k) as j:
                    sums.put(0, sums.vec(0, lanes) + part(let(row * top_k + j), column), lanes)
                out.put(row * width + column, sums.vec(0, lanes), lanes)
    return k.function
