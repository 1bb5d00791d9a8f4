"""What evicting caches share: a fixed number of tokens per head, chosen by the attention that they received.

    before                                            after
    kv_cache_update(key_cache, k, positions)          keys = cat(key_kept, k)      places = cat(held - 1, positions)
    kv_cache_update(value_cache, v, positions)        values = cat(value_kept, v)
    y = attention(q, key_cache[:T], …)                y, mass = attention_with_mass(q, keys, values, …, places)
                                                      evicting_update(key_kept, …, held, score, k, v, positions, mass)

New tokens attend to what is held and to each other, then the cache is cut to its budget: a prompt longer than the
budget attends to all of itself, as in the papers. Keys keep the rotation of their place in the text.
"""

import operator
from typing import ClassVar

import torch
from torch import fx

from graphwright.contract import StateSpec
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import attention_with_mass, evicting_update
from graphwright.pass_ import Context, PassResult
from graphwright.passes.kv_cache._layout import (
    CacheLayout,
    Layer,
    drop_unused,
    entry_bytes,
    find_layers,
    require_causal_only,
)
from graphwright.program import Program
from graphwright.rewrite import Editor, extend_contract

aten = torch.ops.aten


class EvictingCache(CacheLayout):
    """Base: subclasses say how many tokens are held and which go."""

    kind = "approximate"
    provides = ("evicting_cache",)
    conflicts: ClassVar[tuple[str, ...]] = (
        "evicting_cache", "quantized_cache", "kivi_cache", "kvquant_cache", "streaming_cache", "paged_cache",
    )  # fmt: skip
    count_low: ClassVar[bool] = False
    highest: ClassVar[bool] = True

    def held(self, context_length: int) -> int:
        """Tokens of a full cache."""
        raise NotImplementedError(f"pass {self.name} defines no budget")

    def protected(self, held: int) -> int:
        """Newest tokens that are never evicted."""
        raise NotImplementedError(f"pass {self.name} defines no recent tokens")

    def freed(self, held: int) -> int:
        """Slots that an eviction frees at once."""
        return 0

    def observed(self) -> int:
        """Last queries whose attention counts before an eviction; 0 for all."""
        return 0

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every cache that holds the whole text.

        Raises:
            PassError: no such cache, a budget without room, or attention whose mask is not plainly causal.
        """
        layers = find_layers(program, self.name)
        require_causal_only(program, layers)
        held = self.held(program.metadata.context_length)
        recent, free = self.protected(held), self.freed(held)
        if not 0 < recent < held - free:
            raise PassError(
                f"A cache of {held} tokens that keeps the {recent} newest and frees {free} at once has no room",
                fix="Raise the budget, or keep fewer recent tokens",
            )
        specs = {layer.index: _specs(layer, held) for layer in layers}
        inputs = extend_contract(program, state=tuple(s for each in specs.values() for s in each))
        with Editor(program, self.name) as editor:
            for layer in layers:
                state = [inputs[spec.name] for spec in specs[layer.index]]
                self._rewrite(editor, layer, state, (recent, free, self.observed(), self.highest))
        names = [cache.spec.name for layer in layers for cache in (layer.key, layer.value)]
        extend_contract(program, drop=tuple(names))
        drop_unused(program)
        entry = sum(entry_bytes(cache.spec) for layer in layers for cache in (layer.key, layer.value))
        heads = sum(layer.key.kv_heads for layer in layers)
        notes = {"tokens": held, "recent": recent, "cache_bytes": held * (entry + heads * 12)}
        return PassResult(program, editor.sites, notes=notes)

    def _rewrite(self, editor: Editor, layer: Layer, state: list[fx.Node], options: tuple[int, int, int, bool]) -> None:
        node, positions = layer.attention, layer.key.slots
        held = state[2]

        def call(target: object, *args: object) -> fx.Node:
            return editor.call(target, *args, before=node)

        size = int(held.meta["val"].shape[2])
        new = (layer.key.new, layer.value.new)
        key, value = (
            call(aten.cat.default, [call(aten.slice.Tensor, cache, 2, 0, size), fresh], 2)
            for cache, fresh in zip(state[:2], new, strict=True)
        )
        shared = call(aten.expand.default, call(aten.unsqueeze.default, positions, 1), [-1, layer.key.kv_heads, -1])
        places = call(aten.cat.default, [call(aten.sub.Tensor, held, 1), shared], 2)
        given = {name: argument(node, name) for name in ("alibi_slopes", "sinks", "scale", "softcap")}
        extras = (given["alibi_slopes"], given["sinks"], given["scale"], given["softcap"])
        tensors = (node.args[0], key, value, positions, places)
        made = call(attention_with_mass, *tensors, *extras, self.count_low, options[2])
        out, mass = (call(operator.getitem, made, index) for index in (0, 1))
        call(evicting_update, *state, *new, positions, mass, *options)
        for cache in (layer.key, layer.value):
            editor.program.graph.erase_node(cache.write)
        editor.replace(node, out, f"{size} tokens")


def _specs(layer: Layer, held: int) -> list[StateSpec]:
    heads = layer.key.kv_heads
    return [
        *(
            StateSpec(f"{cache.spec.name}_kept", cache.spec.dtype, ("batch", heads, held + 1, cache.head_dim))
            for cache in (layer.key, layer.value)
        ),
        StateSpec(f"{layer.key.spec.name}_held", torch.int64, ("batch", heads, held)),
        StateSpec(f"{layer.key.spec.name}_score", torch.float32, ("batch", heads, held)),
    ]
