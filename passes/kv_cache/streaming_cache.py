"""StreamingLLM: caches of the first tokens and the last ones, for texts of any length.

    before                                            after
    k = rope(x, positions)                            y = streaming_attention(xq, key_ring, value_ring, x, v, …)
    kv_cache_update(key_cache, k, positions)          kv_cache_update(key_ring, x, slots)
    y = attention(rope(xq), key_cache[:T], …)         kv_cache_update(value_ring, v, slots)

Models put much attention on the first tokens whatever they say; a window without them falls apart (Xiao et al. 2023,
arXiv:2309.17453). Memory and time per token stay the same however long the text, and positions are places inside the
cache, so that no text is too long. Up to `sinks + window` tokens nothing changes.
"""

import torch
from pydantic import Field
from torch import fx

from graphwright.contract import StateSpec
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import attention, kv_cache_update, rope, streaming_attention, streaming_slots
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.kv_cache._layout import (
    CacheLayout,
    Layer,
    drop_unused,
    entry_bytes,
    find_layers,
    require_causal_only,
)
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract


class StreamingCache(CacheLayout):
    """Attention sinks and a ring."""

    name = "streaming_cache"
    kind = "approximate"
    paper = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al.", 2023, "2309.17453")
    provides = ("evicting_cache", "streaming_cache")
    conflicts = ("evicting_cache", "quantized_cache", "kivi_cache", "kvquant_cache", "paged_cache")

    sinks: int = Field(4, ge=0, description="first tokens that stay")
    window: int = Field(1020, ge=1, description="last tokens that are seen, the newest among them")

    @property
    def streamed(self) -> int:
        """Enough tokens for the window to move."""
        return self.sinks + 2 * self.window

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every cache that holds the whole text.

        Raises:
            PassError: no such cache, a cache longer than the model's context, or positions that are not those of rope.
        """
        size, longest = self.sinks + self.window, program.metadata.context_length
        if size > longest:
            raise PassError(
                f"{self.sinks} sinks and a window of {self.window} are more than the model's context of {longest}",
                fix=f"Choose a window of at most {longest - self.sinks}",
            )
        layers = find_layers(program, "StreamingLLM")
        require_causal_only(program, layers)
        for layer in layers:
            _require_rope(layer)
        specs = {cache.spec.name: self._spec(cache.spec) for layer in layers for cache in (layer.key, layer.value)}
        inputs = extend_contract(program, state=tuple(specs.values()))
        with Editor(program, self.name) as editor:
            first = layers[0].key
            slots = editor.call(streaming_slots, first.slots, self.sinks, self.window, before=first.write)
            for layer in layers:
                caches = [inputs[specs[cache.spec.name].name] for cache in (layer.key, layer.value)]
                self._rewrite(editor, layer, caches, slots)
        extend_contract(program, drop=tuple(specs))
        drop_unused(program)
        _require_no_other_positions(program)
        _allow_any_position(program)
        entry = sum(entry_bytes(spec) for spec in specs.values())
        return PassResult(program, editor.sites, notes={"tokens": size, "cache_bytes": size * entry})

    def _spec(self, spec: StateSpec) -> StateSpec:
        batch, heads, _, width = spec.shape
        return StateSpec(f"{spec.name}_ring", spec.dtype, (batch, heads, self.sinks + self.window + 1, width))

    def _rewrite(self, editor: Editor, layer: Layer, caches: list[fx.Node], slots: fx.Node) -> None:
        node, turned = layer.attention, layer.key.new
        inv_freq, *rotation = (argument(turned, name) for name in ("inv_freq", "scaling", "interleaved"))
        new = (turned.args[0], layer.value.new)
        query = node.args[0].args[0]
        extras = (argument(node, "sinks"), argument(node, "scale"), self.sinks, self.window)
        tensors = (query, *caches, *new, layer.key.slots, inv_freq)
        made = editor.call(streaming_attention, *tensors, *extras, *rotation, argument(node, "softcap"), before=node)
        for ring, fresh in zip(caches, new, strict=True):
            editor.call(kv_cache_update, ring, fresh, slots, before=node)
        for cache in (layer.key, layer.value):
            editor.program.graph.erase_node(cache.write)
        editor.replace(node, made, f"{self.sinks} sinks, {self.window} last tokens")


def _require_rope(layer: Layer) -> None:
    """Refuses positions that cannot be given anew inside a cache, and masks that are not plainly causal."""
    node, key = layer.attention, layer.key.new
    query = node.args[0]
    turned = all(isinstance(x, fx.Node) and x.target is rope.target for x in (query, key))
    names = ("inv_freq", "scaling", "interleaved")
    if not turned or any(argument(query, name) != argument(key, name) for name in names):
        raise PassError(
            "Queries and keys are not rotated by rope as a whole, so they have no positions inside a cache",
            where=describe(node),
            fix="Use h2o_cache or scissorhands_cache, which leave positions as they are",
        )
    if argument(node, "alibi_slopes") is not None:
        raise PassError("An attention has alibi_slopes, which a streaming cache does not keep", where=describe(node))


def _require_no_other_positions(program: Program) -> None:
    """Refuses a table of learned positions, which ends."""
    place = next(node for node in program.graph.nodes if node.target == "positions")
    reach = {place}
    for node in program.graph.nodes:
        if node.op == "call_function" and reach.intersection(node.all_input_nodes):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if node.target not in (streaming_attention.target, rope.target, attention.target):
                    raise PassError("Positions are embedded, and a table of positions ends", where=describe(node))
            elif node.target is not kv_cache_update.target:
                reach.add(node)


def _allow_any_position(program: Program) -> None:
    """Lets the contract say that positions have no bound."""
    inputs = tuple(
        type(spec)(spec.name, spec.dtype, spec.shape, spec.role) if spec.role == "position" else spec
        for spec in program.contract.inputs
    )
    program.contract = program.contract.with_(inputs=inputs)
