"""What the conversions to fewer key-value heads share: finding heads, new projections, calibration.

    before                                            after
    q, k, v = Wq x, Wk x, Wv x     H, Hkv, Hkv heads  q, k, v = Wq' x, Wk' x, Wv' x    H, groups, groups heads
    y = attention(rope(q), rope(k), v)                y = attention(rope(q), rope(k), v)
    out = Wo y                                        out = Wo' y

Projections of keys and values, and caches, shrink by Hkv / groups; those of queries and the output keep their size.
A calibrated conversion puts the new attention beside the old one, so that while calibration text runs through the
program each layer is solved for what flows into it behind the layers that are converted already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import calibration
from graphwright.calibration import Hessian, Stop
from graphwright.errors import PassError
from graphwright.heads import Heads, Projection, attention_heads, options_of, rebuild
from graphwright.layer_pass import refuse_after
from graphwright.match import argument
from graphwright.ops import attention
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.passes.attention._merging import HeadWeights, spread
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


class WithOne(Hessian):
    """X^T X of inputs with a last channel that is one, so that biases are weights like others."""

    def add(self, rows: Tensor) -> None:
        """Adds a batch."""
        super().add(torch.cat([rows, rows.new_ones(len(rows), 1)], 1))


class Fit:
    """Moments of what an output projection reads, and of what it still misses.

    Rows are [y, t, t - Wo y]: the new heads, what the old attention gave, and the difference, each [tokens, .].
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self.read, self.missed = torch.zeros(0), torch.zeros(0)
        self.wanted_square, self.missed_square = 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Adds a batch."""
        read, rest = rows[:, : self.width], rows[:, self.width :]
        wanted, missed = rest.chunk(2, 1)
        if not self.count:
            self.read = read.new_zeros(self.width, self.width)
            self.missed = read.new_zeros(missed.shape[1], self.width)
        self.read.addmm_(read.t(), read)
        # Not from the moments of `wanted`: their rounding would be taken for something to fit.
        self.missed.addmm_(missed.t(), read)
        self.wanted_square += float(wanted.double().square().sum())
        self.missed_square += float(missed.double().square().sum())
        self.count += len(rows)


class GqaConversion(Pass):
    """Base of the passes that merge key-value heads."""

    kind = "approximate"
    requires = ("linear", "attention", "rope", "rms_norm", "gated_activation", "grouped_heads", "mask")
    after = ("float_dtype", "fewer_layers")
    # Like pruning: what comes after it must see the smaller layers.
    provides = ("pruned", "fewer_kv_heads")
    undoes: ClassVar[tuple[str, ...]] = ("merged_linear", "kv_cache", "explicit_kv_cache", "quantized", "sparse",
                                         "low_rank")  # fmt: skip
    calibrated: ClassVar[bool] = True
    refits: ClassVar[bool] = False
    """Whether the output projection is fitted to what the old attention gives."""

    groups: int = Field(gt=0, description="key-value heads to keep; a divisor of their number")
    damping: float = Field(0.01, gt=0, lt=1, description="part of the mean added to the diagonal of second moments")

    @property
    def calibrates(self) -> bool:
        """Unless the weights alone decide."""
        return self.calibrated

    def order(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> Tensor:
        """The order [Hkv] that puts the heads of each group next to each other; as they are, unless overridden."""
        return torch.arange(heads.kv_heads)

    def merge(self, weights: HeadWeights, heads: Heads, gram: Tensor | None) -> HeadWeights:
        """One key-value head for each group of neighbours; `gram` [K, K] if calibrated."""
        raise NotImplementedError(f"pass {self.name} merges nothing")

    def run(self, program: Program, context: Context) -> PassResult:
        """Converts every attention that has more key-value heads than `groups`.

        Raises:
            PassError: there is none, `groups` does not divide their number, or an earlier pass is in the way.
        """
        refuse_after(self, program, self.undoes)
        found, misses = attention_heads(program)
        chosen = [heads for heads in found if heads.kv_heads != self.groups]
        self._refuse(chosen, found, misses)
        with Editor(program, self.name, context.fuel) as editor:
            allowed = [heads for heads in chosen if editor.allow(heads.node)]
            sites = [_Site(editor, heads, self.groups, self.refits) for heads in allowed]
            errors = self._solve(program, context, sites)
        kept = {heads.name: [self.groups, heads.kv_heads] for heads in allowed}
        return PassResult(program, editor.sites, notes={"kv_heads": kept, "left": misses}, layer_errors=errors)

    def _refuse(self, chosen: Sequence[Heads], found: Sequence[Heads], misses: list[str]) -> None:
        for heads in chosen:
            if heads.kv_heads % self.groups:
                legal = [count for count in range(1, heads.kv_heads) if heads.kv_heads % count == 0]
                raise PassError(
                    f"{heads.kv_heads} key-value heads cannot be cut into {self.groups} equal groups",
                    where=heads.name,
                    fix=f"Legal numbers are {', '.join(map(str, legal))}",
                )
        if not chosen:
            reason = f"all attentions have {self.groups} key-value heads already" if found else (misses or ["none"])[0]
            raise PassError(f"No attention can get fewer key-value heads: {reason}", fix="Leave the pass out")

    def _solve(self, program: Program, context: Context, sites: Sequence["_Site"]) -> dict[str, float]:
        errors: dict[str, float] = {}
        if not self.calibrated:
            for site in sites:
                site.fill(self._merged(site, None))
                errors[site.heads.name] = site.pooling_error()
            return errors
        stops = [stop for site in sites for stop in site.stops()]

        def visit(index: int, collected: WithOne | Fit) -> dict[fx.Node, Tensor]:
            site = sites[index // 2]
            if isinstance(collected, Fit):
                errors[site.heads.name] = site.settle(collected, self.damping)
            else:
                site.fill(self._merged(site, _damped(collected, self.damping)))
            return {}

        batches = calibration.samples(program, context)
        widths = iter([width for site in sites for width in (0, site.heads.columns.numel())])

        def collector() -> WithOne | Fit:
            width = next(widths)
            return Fit(width) if width else WithOne()

        calibration.walk(program, batches, stops, collector, visit, context.progress)
        return errors

    def _merged(self, site: "_Site", gram: Tensor | None) -> tuple[Tensor, HeadWeights]:
        weights = site.weights()
        if gram is not None and not site.biased:
            gram = gram[:-1, :-1]
        order = self.order(weights, site.heads, gram)
        return order, self.merge(weights.reordered(order), site.heads, gram)


def _damped(collected: Hessian, damping: float) -> Tensor:
    gram = collected.matrix.double() / collected.count
    gram.diagonal().add_(damping * gram.diagonal()[:-1].mean())
    return gram


@dataclass
class _New:
    """The new nodes of one attention."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    node: fx.Node


class _Site:
    """One attention with its replacement, whose weights are zeros until `fill`."""

    def __init__(self, editor: Editor, heads: Heads, groups: int, refits: bool) -> None:
        self.editor, self.heads, self.groups, self.refits = editor, heads, groups, refits
        self.program = editor.program
        self.input = heads.key.maker.args[0]
        self.old = self.weights()
        self.old_out = self.program.weight(heads.reader.args[1]).double()
        self.new = self._build()
        self.beside = self._beside()

    @property
    def biased(self) -> bool:
        """Whether weights carry a bias as their last column."""
        return any(len(side.maker.args) > 2 and side.maker.args[2] is not None for side in self._sides())

    def _sides(self) -> tuple[Projection, ...]:
        return self.heads.query, self.heads.key, self.heads.value

    def weights(self) -> HeadWeights:
        """What the old attention computes with."""
        if hasattr(self, "old"):
            return self.old
        out = self.program.weight(self.heads.reader.args[1]).double()
        columns = out[:, self.heads.columns.flatten()].t().unflatten(0, self.heads.columns.shape)
        query, key, value = (self._rows(side) for side in self._sides())
        return HeadWeights(query, key, value, columns)

    def _rows(self, side: Projection) -> Tensor:
        """The rows [heads, D, K] of a projection, with a column for biases if any of the three has one."""
        args = side.maker.args
        weight = self.program.weight(args[1]).double()[side.rows]
        if not self.biased:
            return weight
        has = len(args) > 2 and args[2] is not None
        bias = self.program.weight(args[2]).double()[side.rows] if has else weight.new_zeros(side.rows.shape)
        return torch.cat([weight, bias[..., None]], -1)

    def _build(self) -> _New:
        editor, heads, node = self.editor, self.heads, self.heads.node
        made = []
        for side, count in zip(self._sides(), (len(heads.query.rows), self.groups, self.groups), strict=True):
            name = f"{side.maker.args[1].target}_{self.groups}_kv_heads"
            made.append(rebuild(editor, side, name, count, before=node))
        constants = [self._own(name) for name in ("alibi_slopes", "sinks")]
        rest = (argument(node, "query_positions"), argument(node, "key_positions"), argument(node, "bias"), *constants)
        new = editor.call(attention, *(side for _, side in made), *rest, before=node, **options_of(node))
        query, key, value = (linear for linear, _ in made)
        return _New(query, key, value, new)

    def _own(self, name: str) -> fx.Node | None:
        """A copy of a constant per query head, to be filled in the new order."""
        constant = argument(self.heads.node, name)
        if constant is None:
            return None
        return self.editor.weight(str(constant.target), self.program.weight(constant).clone(), before=self.heads.node)

    def _beside(self) -> fx.Node:
        """The rows of `Fit`, with biases left out; from here on the reader reads the new attention."""
        reader, old = self.heads.reader, self.heads.node
        path = [reader.args[0]]
        while path[-1] is not old:
            path.append(path[-1].args[0])
        copied = old
        for node in reversed(path[:-1]):
            copied = self.editor.call(node.target, copied, *node.args[1:], before=reader, **node.kwargs)
        target = self.editor.call(aten.linear.default, copied, reader.args[1], before=reader)
        weight = self.program.weight(reader.args[1])
        own = self.editor.weight(str(reader.args[1].target), weight.clone(), before=reader)
        reader.update_arg(1, own)
        behind = path[-2] if len(path) > 1 else reader
        behind.replace_input_with(old, self.new.node)
        self.editor.note(old, f"{self.heads.kv_heads} to {self.groups} key-value heads")
        found = self.editor.call(aten.linear.default, reader.args[0], own, before=reader)
        missed = self.editor.call(aten.sub.Tensor, target, found, before=reader)
        return self.editor.call(aten.cat.default, [reader.args[0], target, missed], -1, before=reader)

    def stops(self) -> list[Stop]:
        """What is observed: the projections' input, and the new heads beside what the old ones gave."""
        return [Stop(self.input, f"{self.heads.name} input"), Stop(self.beside, f"{self.heads.name} output")]

    def fill(self, solved: tuple[Tensor, HeadWeights]) -> None:
        """Writes the weights of the new attention in place: they are its own, and a running walk reads them."""
        order, merged = solved
        parts = zip(
            (self.new.query, self.new.key, self.new.value), (merged.query, merged.key, merged.value), strict=True
        )
        for linear, rows in parts:
            whole = rows.flatten(0, 1)
            width = linear.args[0].meta["val"].shape[-1]
            self.program.weight(linear.args[1]).copy_(whole[:, :width])
            if len(linear.args) > 2:
                self.program.weight(linear.args[2]).copy_(whole[:, -1])
        out = self.old_out.clone()
        out[:, self.heads.columns.flatten()] = merged.out.flatten(0, 1).t()
        self.program.weight(self.heads.reader.args[1]).copy_(out)
        readers = spread(order, self.heads.share)
        for name in ("alibi_slopes", "sinks"):
            constant = argument(self.new.node, name)
            if constant is not None:
                self.program.weight(constant).copy_(self.program.weight(argument(self.heads.node, name))[readers])

    def pooling_error(self) -> float:
        """How far the rows of keys and values moved, relative; without inputs there is nothing better to say."""
        kept = [self._merged_rows(linear) for linear in (self.new.key, self.new.value)]
        pairs = zip(kept, (self.old.key, self.old.value), strict=True)
        return max(float((new - old[..., : new.shape[-1]]).norm() / old.norm()) for new, old in pairs)

    def _merged_rows(self, linear: fx.Node) -> Tensor:
        rows = self.program.weight(linear.args[1]).double().unflatten(0, (self.groups, -1))
        return rows.repeat_interleave(self.heads.kv_heads // self.groups, 0)

    def settle(self, fit: Fit, damping: float) -> float:
        """Fits the output projection to what the old attention gives, if asked to; returns the error that is left."""
        missed = fit.missed_square
        if self.refits:
            read, cross = fit.read.double(), fit.missed.double()
            ridge = read + damping * read.diagonal().mean() * torch.eye(fit.width, dtype=read.dtype)
            change = torch.linalg.solve(ridge, cross.t()).t()
            weight = self.program.weight(self.heads.reader.args[1])
            weight.copy_(weight.double() + change)
            missed += float(((change @ read) * change).sum() - 2 * (change * cross).sum())
        return float((max(missed, 0.0) / max(fit.wanted_square, 1e-30)) ** 0.5)
