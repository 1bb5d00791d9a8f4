"""KVQuant: keys before their rotation, per channel; codebooks from calibration; outliers and the first token apart.

    before                                            after
    k = rope(x, positions)                            codes, … = kvquant_encode(x, center, reach, codebook)
    kv_cache_update(key_cache, k, positions)          kv_cache_update(key_codes, codes, positions) …
    y = attention(q, key_cache[:T], …)                held = where(first, first_x, kvquant_decode(key_codes[:T], …))
                                                      y = attention(q, rope(held, key_positions), …)

Rotation mixes channels, whose outliers are in place before it; values have a range for each token. Levels are not
uniform: k-means over normalised entries of the calibration text, for each layer. All entries weigh the same, where the
paper weighs them by the Fisher information, which needs gradients (Hooper et al. 2024, arXiv:2401.18079). Of each token
a hundredth of the entries, the farthest, are stored as they are, and so is the first token, which attention leans on.
Keys that are not rotated as a whole (DeepSeek's) are quantized as they are. Dequantized in memory at every step.
"""

import math
import operator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import calibration
from graphwright.calibration import Stop, walk
from graphwright.contract import StateSpec
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import kv_cache_update, kvquant_decode, kvquant_encode, rope
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.kv_cache._layout import Cache, CacheLayout, entry_bytes, find_layers
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract

aten = torch.ops.aten

ROUNDS = 24
"""Of k-means; quantiles are a good start."""

KEPT = 512
"""Tokens of each calibration batch that are looked at."""


class KvquantCache(CacheLayout):
    """Non-uniform caches with a dense and a sparse part."""

    name = "kvquant_cache"
    kind = "approximate"
    paper = Paper(
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", "Hooper et al.", 2024,
        "2401.18079",
    )  # fmt: skip
    provides = ("kvquant_cache",)
    conflicts = ("kvquant_cache", "quantized_cache", "kivi_cache", "evicting_cache")

    bits: Literal[2, 3, 4] = Field(3, description="bits per code")
    outliers: float = Field(0.01, gt=0, le=0.25, description="share of a token's entries that are stored as they are")

    @property
    def calibrates(self) -> bool:
        """Codebooks and channels' ranges are measured."""
        return True

    @property
    def streamed(self) -> int:
        """The error does not depend on chunks; a few drawn tokens do."""
        return 48

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every cache that holds the whole text.

        Raises:
            PassError: no such cache, heads that cannot be packed, or calibration inputs that are missing.
        """
        layers = find_layers(program, "KVQuant")
        found = [(cache, layer.attention) for layer in layers for cache in (layer.key, layer.value)]
        sources = [_before_rope(cache) for cache, _ in found]
        rotated = sum(source is not cache.new for (cache, _), source in zip(found, sources, strict=True))
        samples = _entries(program, sources, context)
        for cache, _ in found:
            self._check(cache)
        # Keys and values take turns: keys have a range for each channel.
        specs = {cache.spec.name: self._specs(cache, i % 2 == 0) for i, (cache, _) in enumerate(found)}
        inputs = extend_contract(program, state=tuple(s for each in specs.values() for s in each))
        with Editor(program, self.name) as editor:
            slots = _first_slot(editor, found[0][0])
            for i, (cache, node) in enumerate(found):
                state = [inputs[spec.name] for spec in specs[cache.spec.name]]
                tables = _tables(samples[i], self.bits, self._count(cache), per_channel=i % 2 == 0)
                self._rewrite(editor, cache, node, state, tables, slots)
        extend_contract(program, drop=tuple(cache.spec.name for cache, _ in found))
        before = sum(entry_bytes(cache.spec) for cache, _ in found)
        after = sum(entry_bytes(s) for each in specs.values() for s in each if s.shape[2] == "capacity")
        notes = {"cache_bytes_per_token": [before, after], "keys_before_rope": rotated}
        return PassResult(program, editor.sites, notes=notes)

    def _count(self, cache: Cache) -> int:
        return math.ceil(self.outliers * cache.kv_heads * cache.head_dim)

    def _check(self, cache: Cache) -> None:
        width = cache.kv_heads * cache.head_dim
        if width % 8:
            raise PassError(
                f"A token has {width} entries, and codes are packed eight at a time",
                where=describe(cache.write),
                fix="Use quantized_cache in int8",
            )

    def _specs(self, cache: Cache, per_channel: bool) -> list[StateSpec]:
        name, (batch, heads, slots, channels) = cache.spec.name, cache.spec.shape
        count, width = self._count(cache), cache.kv_heads * cache.head_dim
        ranges = [] if per_channel else [StateSpec(f"{name}_ranges", torch.float16, (batch, 1, slots, 2))]
        return [
            StateSpec(f"{name}_codes", torch.uint8, (batch, 1, slots, width * self.bits // 8)),
            *ranges,
            StateSpec(f"{name}_outliers", torch.float16, (batch, 1, slots, count)),
            StateSpec(f"{name}_places", torch.int16, (batch, 1, slots, count)),
            StateSpec(f"{name}_first", cache.spec.dtype, (batch, heads, 2, channels)),
        ]

    def _rewrite(
        self,
        editor: Editor,
        cache: Cache,
        node: fx.Node,
        state: list[fx.Node],
        tables: dict[str, Tensor],
        slots: fx.Node,
    ) -> None:
        turned, source = cache.new, _before_rope(cache)
        stored = {n: editor.weight(f"{cache.spec.name}_{n}", t, before=cache.write) for n, t in tables.items()}
        center, reach = stored.get("center"), stored.get("reach")
        rest = (center, reach, stored["codebook"])
        made = editor.call(kvquant_encode, source, *rest, self._count(cache), self.bits, before=cache.write)
        *parts, first = state
        wanted = (0, 2, 3) if center is not None else (0, 1, 2, 3)
        for index, part in zip(wanted, parts, strict=True):
            new = editor.call(operator.getitem, made, index, before=cache.write)
            editor.call(kv_cache_update, part, new, cache.slots, before=cache.write)
        editor.call(kv_cache_update, first, source, slots, before=cache.write)
        held = [editor.call(aten.slice.Tensor, p, *cache.read.args[1:], before=cache.read) for p in parts]
        if center is not None:
            held.insert(1, None)
        options = (self.bits, cache.kv_heads, cache.spec.dtype)
        dense = editor.call(kvquant_decode, *held, *rest, *options, before=cache.read)
        value = _with_first(editor, dense, first, cache.read)
        if source is not turned:
            value = editor.call(rope, value, node.args[4], *turned.args[2:], before=cache.read, **turned.kwargs)
        editor.program.graph.erase_node(cache.write)
        editor.replace(cache.read, value, f"{self.bits} bits")
        editor.program.graph.erase_node(cache.read)


def _before_rope(cache: Cache) -> fx.Node:
    """What a cache would hold before its rotation."""
    new: Any = cache.new
    turned = new.target is rope.target and len(new.users) == 1 and argument(new, "x") is new.args[0]
    return new.args[0] if turned else new


def _first_slot(editor: Editor, cache: Cache) -> fx.Node:
    """Slot 0 for the first token of a text, -1 for all others, [B, S]."""
    first = editor.call(aten.eq.Scalar, cache.slots, 0, before=cache.write)
    none = editor.call(aten.full_like.default, cache.slots, -1, before=cache.write)
    return editor.call(aten.where.ScalarSelf, first, 0, none, before=cache.write)


def _with_first(editor: Editor, dense: fx.Node, first: fx.Node, before: fx.Node) -> fx.Node:
    """The decoded tokens, with the first as it was."""
    kept = editor.call(aten.slice.Tensor, first, 2, 0, 1, before=before)
    count = editor.call(aten.sym_size.int, dense, 2, before=before)
    place = editor.call(
        aten.unsqueeze.default, editor.call(aten.arange.default, count, before=before), 1, before=before
    )
    return editor.call(
        aten.where.self, editor.call(aten.eq.Scalar, place, 0, before=before), kept, dense, before=before
    )


class _Tokens:
    """Entries [tokens, Hkv * D] of one cache; rows come as [B * Hkv * S, D] of one batch after the other."""

    def __init__(self, kv_heads: int, batches: list[int]) -> None:
        self.parts: list[Tensor] = []
        self._kv_heads = kv_heads
        self._batches = iter(batches)

    def add(self, rows: Tensor) -> None:
        """Takes one calibration batch."""
        heads = rows.reshape(next(self._batches), self._kv_heads, -1, rows.shape[-1])
        self.parts.append(heads.transpose(1, 2).flatten(2).flatten(0, 1)[:KEPT])


def _entries(program: Program, sources: list[fx.Node], context: Context) -> list[Tensor]:
    """Entries [tokens, Hkv * D] that calibration puts into each cache."""
    batches = calibration.samples(program, context)
    sizes = [len(batch["input_ids"]) for batch in batches]
    # Keys of a layer need not come before its values; a walk goes in graph order.
    place = {node: at for at, node in enumerate(program.graph.nodes)}
    order = sorted(range(len(sources)), key=lambda i: place[sources[i]])
    found: dict[int, Tensor] = {}

    def visit(number: int, tokens: _Tokens) -> dict[fx.Node, Tensor]:
        found[order[number]] = torch.cat(tokens.parts)
        return {}

    stops = [Stop(sources[i], sources[i].name) for i in order]
    heads = iter([int(sources[i].meta["val"].shape[1]) for i in order])
    walk(program, batches, stops, lambda: _Tokens(next(heads), sizes), visit, context.progress)
    return [found[i] for i in range(len(sources))]


def _tables(tokens: Tensor, bits: int, outliers: int, *, per_channel: bool) -> dict[str, Tensor]:
    """Codebook, and each channel's center and reach, from entries [tokens, W]."""
    if not per_channel:
        dummy = torch.zeros(2**bits)
        _, ranges, _, places = kvquant_encode(tokens[None, None], None, None, dummy, outliers, bits)
        middle, half = ranges[0, 0].float().split(1, -1)
        inside = torch.ones_like(tokens, dtype=torch.bool).scatter(-1, places[0, 0].long(), False)
        return {"codebook": codebook(((tokens - middle) / half)[inside], bits)}
    share = outliers / tokens.shape[1] / 2
    low, high = tokens.quantile(share, 0), tokens.quantile(1 - share, 0)
    center, reach = (low + high) / 2, ((high - low) / 2).clamp_min(1e-6)
    scaled = (tokens - center) / reach
    return {"codebook": codebook(scaled[scaled.abs() <= 1], bits), "center": center, "reach": reach}


def codebook(values: Tensor, bits: int) -> Tensor:
    """Ascending levels [2^bits] that are nearest to `values` on average (k-means in one dimension)."""
    ordered = values.flatten()[: 1 << 20].sort().values
    count = 2**bits
    levels = ordered[((torch.arange(count) + 0.5) / count * len(ordered)).long()].clone()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.double().cumsum(0)])
    for _ in range(ROUNDS):
        ends = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), ends, torch.tensor([len(ordered)])])
        sizes = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / sizes.clamp(min=1)
        levels = torch.where(sizes > 0, means.float(), levels)
    return levels.sort().values
