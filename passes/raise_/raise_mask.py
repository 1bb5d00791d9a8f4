"""Masks raised: a mask becomes what it means, found by evaluating it, never by how it is spelled.

    before                                                  after
    m = (k <= q) & (k > q - 5) & attention_mask[b, k]       p = where(attention_mask != 0, arange(T), -1)
    y = attention(q, k, v, bias=where(m, 0, -inf) + t)      y = attention(q, k, v, key_positions=p, bias=t,
                                                                          causal=True, window=5)

The bias is split into terms. Terms that follow from sizes, constants and the attention mask, and consist of zeros and
numbers that mask, are evaluated at several sizes with and without padding (right, left, anywhere); the sizes are
chosen from the numbers in their sub-graph, so that windows and chunks show. If causal, window, chunk, prefix and
padding reproduce them everywhere, they go. A term slope * key position becomes `alibi_slopes` (Press et al. 2022,
arXiv:2108.12409). Relative position biases and masks of other kinds stay as they are.

What padding sees does not count: its rows are zeros afterwards where the model may have computed something.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import fx

from graphwright.evaluate import index_domain
from graphwright.match import argument
from graphwright.ops import attention
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.raise_._mask_alibi import Alibi, find_alibi
from graphwright.passes.raise_._mask_probe import Probe, Trial, UnknownMaskError, ancestors
from graphwright.passes.raise_._mask_structure import Structure, classify
from graphwright.passes.raise_._mask_terms import Leaf, masks_only, split
from graphwright.program import Program
from graphwright.rewrite import Editor, describe

aten = torch.ops.aten


class RaiseMask(Pass):
    """Finds out what masks mean."""

    name = "raise_mask"
    kind = "exact"
    paper = Paper("Train Short, Test Long: Attention with Linear Biases", "Press et al.", 2022, "2108.12409")
    requires = ("attention",)
    provides = ("mask",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Removes every mask whose meaning is proved; the others are near misses, with the reason."""
        reading, misses, kinds = _Reading(program), [], Counter[str]()
        with Editor(program, self.name, context.fuel) as editor:
            raising = _Raising(editor)
            for node in program.calls(attention.target):
                if argument(node, "bias") is None:
                    continue
                try:
                    meaning = reading.meaning(node)
                except UnknownMaskError as unknown:
                    misses.append(f"{describe(node)}: its mask stays a bias: {unknown}")
                    continue
                if meaning is not None and editor.allow(node):
                    raising.apply(node, meaning)
                    kinds[str(meaning)] += 1
        return PassResult(program, editor.sites, misses, {"masks": dict(kinds)} if kinds else {})


@dataclass(frozen=True)
class Meaning:
    """What a bias means: a structure, slopes, and what is left to add."""

    structure: Structure
    alibi: Alibi | None
    alibi_leaf: fx.Node | None
    added: tuple[fx.Node, ...]

    def __str__(self) -> str:
        extras = ["alibi"] * (self.alibi is not None) + ["bias"] * bool(self.added)
        return ", ".join([str(self.structure), *extras])


class _Reading:
    """Reads biases; what several layers share is read once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.domain = _mask_domain(program)
        self._known: dict[object, Meaning | None] = {}

    def meaning(self, node: fx.Node) -> Meaning | None:
        """What the bias of an attention means; None if it is nothing but a bias.

        Raises:
            UnknownMaskError: it holds a mask, or what looks like one, that is not understood.
        """
        probe = Probe(self.program, node.args[0], node.args[1])
        leaves = tuple(split(self.program, argument(node, "bias"), lambda leaf: self._is_mask(probe, leaf)))
        key = (leaves, probe.pads_queries, probe.pads_keys)
        if key not in self._known:
            self._known[key] = self._read(probe, leaves)
        return self._known[key]

    def _is_mask(self, probe: Probe, node: fx.Node) -> bool:
        try:
            return node in self.domain and masks_only(probe.values([node], probe.first())[0])
        except UnknownMaskError:
            return False

    def _read(self, probe: Probe, leaves: tuple[Leaf, ...]) -> Meaning | None:
        masks = tuple(leaf for leaf in leaves if leaf.kind != "added")
        added = [leaf.node for leaf in leaves if leaf.kind == "added"]
        if any(leaf.node not in self.domain for leaf in masks):
            raise UnknownMaskError("it depends on more than sizes, constants and the attention mask")
        structure = self._structure(probe, masks)
        alibi = leaf = None
        for candidate in [node for node in added if node in self.domain]:
            alibi = self._alibi(probe, candidate, masks, structure)
            if alibi is not None:
                leaf = candidate
                added.remove(candidate)
                break
        if not masks and alibi is None:
            return None
        return Meaning(structure, alibi, leaf, tuple(added))

    def _structure(self, probe: Probe, masks: tuple[Leaf, ...]) -> Structure:
        if not masks:
            return Structure()
        cases, problem = [], "it is none of causal, window, chunk, prefix and padding"
        for trial in probe.trials(probe.lengths(leaf.node for leaf in masks)):
            try:
                cases.append(probe.case(masks, trial))
            except UnknownMaskError as unknown:
                if not self._is_too_long(probe, masks, trial):
                    raise
                problem = str(unknown)
        structure = classify(cases)
        if structure is None:
            raise UnknownMaskError(problem)
        return structure

    def _is_too_long(self, probe: Probe, masks: tuple[Leaf, ...], trial: Trial) -> bool:
        """Whether a constant in the masks is shorter than this trial, so that the model cannot run at it either."""
        constants = [n for n in ancestors(leaf.node for leaf in masks) if n.op == "get_attr"]
        sizes = {size for n in constants for size in self.program.weight(n).shape if size > 1}
        longest = max((trial.sizes[name] for name in probe.key_dims), default=0)
        return any(size < longest for size in sizes)

    def _alibi(self, probe: Probe, node: fx.Node, masks: tuple[Leaf, ...], structure: Structure) -> Alibi | None:
        try:
            found = find_alibi(probe, node, masks, probe.trials((5, 12, 40)))
        except UnknownMaskError:
            return None
        bounded = structure.window or structure.chunk or structure.prefix
        return None if found and found.counted and (bounded or not structure.padding) else found


def _mask_domain(program: Program) -> set[fx.Node]:
    """The index domain without position inputs: positions may be anything, so nothing follows from their values."""
    positions = {spec.name for spec in program.contract.inputs if spec.role in ("position", "key_position")}
    barred: set[fx.Node] = set()
    for node in program.graph.nodes:
        if (node.op == "placeholder" and node.target in positions) or any(n in barred for n in node.all_input_nodes):
            barred.add(node)
    return index_domain(program) - barred


class _Raising:
    """Builds attentions with mask attributes; positions and slopes are made once and shared."""

    def __init__(self, editor: Editor) -> None:
        self.editor, self.program = editor, editor.program
        self.start = next(self.program.calls())
        self._positions: dict[bool, fx.Node] = {}
        self._slopes: dict[fx.Node, fx.Node] = {}

    def apply(self, node: fx.Node, meaning: Meaning) -> None:
        """Replaces one attention."""
        structure, alibi = meaning.structure, meaning.alibi
        query_positions = key_positions = slopes = bias = None
        if alibi is not None and meaning.alibi_leaf is not None:
            slopes = self._slope_weight(meaning.alibi_leaf, alibi)
        if structure.padding:
            key_positions = self._key_positions(counted=alibi is not None and alibi.counted)
            query_positions = key_positions if alibi is not None and alibi.counted else None
        for term in meaning.added:
            bias = term if bias is None else self.editor.call(aten.add.Tensor, bias, term, before=node)
        if argument(node, "causal"):
            structure = replace(structure, causal=True, prefix=structure.prefix if structure.causal else 0)
        options = {"window": structure.window, "chunk": structure.chunk, "prefix": structure.prefix}
        options["softcap"] = argument(node, "softcap")
        new = self.editor.call(
            attention, *node.args[:3], query_positions, key_positions, bias, slopes, argument(node, "sinks"),
            scale=argument(node, "scale"), causal=structure.causal, before=node,
            **{name: value for name, value in options.items() if value},
        )  # fmt: skip
        self.editor.replace(node, new, str(meaning))

    def _slope_weight(self, leaf: fx.Node, alibi: Alibi) -> fx.Node:
        if leaf not in self._slopes:
            self._slopes[leaf] = self.editor.weight("alibi_slopes", alibi.slopes, before=self.start)
        return self._slopes[leaf]

    def _key_positions(self, *, counted: bool) -> fx.Node:
        """where(attention_mask != 0, positions, -1), positions being 0, 1, 2 … or the count of what is no padding."""
        if counted not in self._positions:
            mask = self._attention_mask()
            device = mask.meta["val"].device
            real = self._call(aten.ne.Scalar, mask, 0)
            if counted:
                positions = self._call(aten.sub.Tensor, self._call(aten.cumsum.default, mask, 1), 1)
            else:
                length = self._call(aten.sym_size.int, mask, 1)
                positions = self._call(aten.arange.default, length, device=device, pin_memory=False)
                positions = self._call(aten.unsqueeze.default, positions, 0)
            self._positions[counted] = self._call(aten.where.ScalarOther, real, positions, -1)
        return self._positions[counted]

    def _attention_mask(self) -> fx.Node:
        spec = self.program.contract.input("attention_mask")
        nodes: list[fx.Node] = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        return next(n for n in nodes if spec is not None and n.target == spec.name)

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self.editor.call(target, *args, before=self.start, **kwargs)
