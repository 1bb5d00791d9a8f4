"""Attention raised: fused calls and written-out softmax chains become one op (Vaswani et al. 2017, arXiv:1706.03762).

    before                                              after
    s = matmul(q, k.transpose(-1, -2)) * scale          y = attention(q, k, v, bias=mask, sinks=sinks,
    s = tanh(s / c) * c + mask                                        scale=scale, softcap=c)
    p = softmax(cat([s, sinks]) - max)[..., :-1]
    y = matmul(p, v)

    y = scaled_dot_product_attention(q, k, v, m)        y = attention(q, k, v, bias=where(m, 0, -inf), scale=…)

Scales on the query or key are absorbed. Masks stay additive biases; `raise_mask` finds out what they mean. Numbers
are the same, except in rows that see no key at all: those are zeros, as in scaled_dot_product_attention, where a
written-out chain averages over all values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ops import attention
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.raise_._attention_chain import Chain, read
from graphwright.passes.raise_._attention_parts import PRODUCTS, SDPA, Term, constant, rank, shape
from graphwright.program import Program
from graphwright.rewrite import Editor, describe

aten = torch.ops.aten

LAYOUT = {aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default}


class RaiseAttention(Pass):
    """Finds attention in the graph."""

    name = "raise_attention"
    kind = "exact"
    paper = Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762")
    provides = ("attention",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every attention that is understood; the others are near misses, with the reason."""
        misses = []
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.calls(SDPA, *PRODUCTS):
                found = read(program, node)
                if isinstance(found, Chain):
                    problem = _Raising(editor, found).run()
                    found = problem if problem else None
                if found is not None:
                    misses.append(f"{describe(node)}: {found}")
        return PassResult(program, editor.sites, misses)


class _Raising:
    """The raising of one chain: brings all parts to rank 4 and builds the op."""

    def __init__(self, editor: Editor, chain: Chain) -> None:
        self.editor, self.chain = editor, chain
        self.heads: list[fx.Node | None] = []
        self.call: Callable[..., fx.Node] = lambda target, *args, **kwargs: editor.call(
            target, *args, before=chain.root, **kwargs
        )

    def run(self) -> str | None:
        """Raises the chain, or says why not."""
        chain = self.chain
        distinct = len({chain.query, chain.key, chain.value}) == 3
        query, key = (
            _unscaled(self.editor.program, part) if distinct else _Scaled(part) for part in (chain.query, chain.key)
        )
        upright, transposed = _upright(key.node, chain.transposed)
        parts = [query.node, upright, chain.value]
        self.heads = [_unmerged(part) for part in parts]
        merged = rank(chain.root) == 3 and all(self.heads)
        single = rank(chain.root) == 3 and not merged
        if single and (chain.sinks is not None or any(term.rank == 4 for term in chain.terms)):
            return "its heads are merged into the batch in a way that is not understood"
        parts = [head for head in self.heads if head is not None] if merged else parts
        problem = _misfit(parts, transposed)
        if problem is not None:
            return problem
        if self.editor.allow(chain.root):
            for part in (query, key):
                part.strip()
            parts = [self.call(aten.unsqueeze.default, part, 1) for part in parts] if single else parts
            parts[1] = self.call(aten.transpose.int, parts[1], -2, -1) if transposed else parts[1]
            self._replace(self._attention(parts, chain.scale * query.factor * key.factor), merged, single)
        return None

    def _attention(self, parts: list[fx.Node], scale: float) -> fx.Node:
        options = {"softcap": self.chain.softcap} if self.chain.softcap else {}
        return self.call(
            attention, *parts, None, None, self._bias(), None, self._sinks(),
            scale=scale, causal=self.chain.causal, **options,
        )  # fmt: skip

    def _bias(self) -> fx.Node | None:
        total = None
        for term in self.chain.terms:
            part = self._part(term)
            total = part if total is None else self.call(aten.add.Tensor, total, part)
        return total

    def _part(self, term: Term) -> fx.Node:
        node = term.node
        if term.fill is not None:
            choices = (term.fill, 0.0) if term.where else (0.0, term.fill)
            node = self.call(aten.where.Scalar, node, *choices)
        elif term.factor != 1:
            node = self.call(aten.mul.Tensor, node, term.factor)
        if term.rank == 4 or rank(node) < 3:
            return node
        if shape(node)[0] == "1" or self.heads[0] is None:
            return self.call(aten.unsqueeze.default, node, 1)
        return self.call(aten.unflatten.int, node, 0, [-1, int(shape(self.heads[0])[1])])

    def _sinks(self) -> fx.Node | None:
        sinks = self.chain.sinks
        if sinks is None:
            return None
        source = sinks.args[0] if sinks.target is aten.reshape.default else None
        if isinstance(source, fx.Node) and rank(source) == 1:
            return source
        return self.call(aten.reshape.default, sinks, [-1])

    def _replace(self, new: fx.Node, merged: bool, single: bool) -> None:
        root = self.chain.root
        user = next(iter(root.users))
        if merged and len(root.users) == 1 and user.target is aten.reshape.default and shape(user) == shape(new):
            root = user
        elif merged:
            new = self.call(aten.flatten.using_ints, new, 0, 1)
        elif single:
            new = self.call(aten.squeeze.dim, new, 1)
        note = "fused" if self.chain.root.target is SDPA else "chain"
        self.editor.replace(root, new, note)


@dataclass(frozen=True)
class _Scaled:
    """A query or key without the factor on it; `product` is the multiplication, if it lies behind layout changes."""

    node: fx.Node
    factor: float = 1.0
    product: fx.Node | None = None

    def strip(self) -> None:
        """Takes the multiplication out of the graph."""
        if self.product is not None:
            self.product.replace_all_uses_with(self.product.args[0])


def _unscaled(program: Program, part: fx.Node) -> _Scaled:
    """Finds a factor on the query or key when layout changes are all that lies between."""
    node = part
    while node.target in LAYOUT and len(node.users) == 1:
        node = node.args[0]  # type: ignore[assignment]
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.users) > 1:
        return _Scaled(part)
    source, factor = node.args[0], constant(program, node.args[1])
    if not isinstance(source, fx.Node) or not factor or shape(source) != shape(node):
        return _Scaled(part)
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return _Scaled(part)
    factor = factor if node.target is aten.mul.Tensor else 1 / factor
    return _Scaled(source, factor) if node is part else _Scaled(part, factor, node)


def _unmerged(node: fx.Node) -> fx.Node | None:
    """The tensor [B, H, X, Y] behind a reshape to, or a transposed reshape to, [B*H, X, Y]."""
    if node.target is not aten.reshape.default or rank(node) != 3:
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    return source if rank(source) == 4 and shape(source)[2:] == shape(node)[1:] else None


def _upright(key: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    """The key without its transposition, if that is the last thing done to it, and whether it still lies."""
    last = rank(key) - 1
    dims: Any = key.args[1:]
    swaps = key.target is aten.transpose.int and {dim % (last + 1) for dim in dims} == {last, last - 1}
    if key.target is aten.permute.default:
        swaps = [dim % (last + 1) for dim in dims[0]] == [*range(last - 1), last, last - 1]
    if transposed and swaps:
        return key.args[0], False  # type: ignore[return-value]
    return key, transposed


def _misfit(parts: list[fx.Node], transposed: bool) -> str | None:
    """Why these tensors cannot be the query, key and value of the op, or None."""
    query, key, value = parts
    if not rank(query) == rank(key) == rank(value) or rank(query) not in (3, 4):
        return "its query, key and value are not [batch, heads, length, features]"
    dtypes = {part.meta["val"].dtype for part in (query, key, value)}
    if len(dtypes) != 1 or torch.float64 in dtypes:
        return f"its dtypes are {', '.join(sorted(str(d) for d in dtypes))}"
    if not shape(query)[0] == shape(key)[0] == shape(value)[0]:
        return "its batches are broadcast"
    length, features = shape(key)[:-3:-1] if transposed else shape(key)[-2:]
    if features != shape(query)[-1] or length != shape(value)[-2]:
        return "the lengths of its keys and values differ"
    heads = [part[1] for part in map(shape, (query, key, value)) if len(part) == 4]
    if heads and (not all(map(str.isdigit, heads)) or heads[1] != heads[2] or int(heads[0]) % int(heads[1])):
        return "its heads do not fit"
    return None
