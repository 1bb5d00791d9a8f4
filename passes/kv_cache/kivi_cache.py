"""KIVI: caches in 2 bits, keys per channel and values per token, behind a window in floating point.

    before                                            after
    kv_cache_update(key_cache, k, positions)          keys = kivi_read(codes, …, residual, k, positions, T)
    kv_cache_update(value_cache, v, positions)        values = kivi_read(…, v, …)
    y = attention(q, key_cache[:T], …)                y = attention(q, keys, values, …)
                                                      kivi_update(codes, …, residual, k, positions, …)

Outliers of keys sit in few channels, those of values do not, so groups of keys run along tokens and groups of values
along channels (Liu et al. 2024, arXiv:2402.02750). The newest tokens stay as they are; a prompt attends to itself in
floating point, as in the paper, and is rounded afterwards. Rings of sliding windows stay too. Caches are dequantized
in memory at every step: they are small, and not fast.

Small models lose most by their keys: of SmolLM2-135M, 3 heads of 64 channels, 2-bit keys cost some 14 % of perplexity
and 2-bit values 3 %, in this cache and in a plain computation of the paper's formula alike. `key_bits` 4 avoids that.
"""

from typing import Literal, cast

import torch
from pydantic import Field
from torch import fx

from graphwright.contract import Dim, StateSpec
from graphwright.errors import PassError
from graphwright.ops import kivi_read, kivi_update
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.kv_cache._layout import Cache, CacheLayout, entry_bytes, find_layers
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract


class KiviCache(CacheLayout):
    """2-bit caches with a floating-point residual."""

    name = "kivi_cache"
    kind = "approximate"
    paper = Paper("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "Liu et al.", 2024, "2402.02750")
    provides = ("kivi_cache",)
    conflicts = ("kivi_cache", "quantized_cache", "kvquant_cache", "evicting_cache", "paged_cache")

    bits: Literal[2, 4] = Field(2, description="bits per code")
    key_bits: Literal[2, 4] | None = Field(None, description="bits per code of keys; as `bits` if left out")
    group_size: int = Field(32, ge=2, description="tokens (of keys) or channels (of values) that share a scale")
    residual: int = Field(128, ge=2, description="newest tokens that are not rounded; a multiple of group_size")

    @property
    def streamed(self) -> int:
        """Enough tokens for most of them to have left the residual."""
        return 3 * self.residual + 64

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every cache that holds the whole text.

        Raises:
            PassError: sizes that do not divide, or no such cache.
        """
        if self.residual % self.group_size:
            raise PassError(
                f"The residual of {self.residual} tokens is no multiple of groups of {self.group_size}",
                fix="Let group_size divide residual",
            )
        layers = find_layers(program, "KIVI")
        found = [(cache, cache is layer.key, layer) for layer in layers for cache in (layer.key, layer.value)]
        for cache, _, _ in found:
            self._check(cache)
        capacity = program.contract.dim("capacity")
        groups = Dim("key_groups", 1, -(-capacity.max // self.group_size), of="capacity", per=self.group_size)
        specs = {cache.spec.name: self._specs(cache, per_channel) for cache, per_channel, _ in found}
        inputs = extend_contract(program, state=tuple(s for each in specs.values() for s in each), dims=(groups,))
        with Editor(program, self.name) as editor:
            for cache, per_channel, layer in found:
                state = [inputs[spec.name] for spec in specs[cache.spec.name]]
                self._rewrite(editor, cache, per_channel, layer.attention, state)
        extend_contract(program, drop=tuple(cache.spec.name for cache, _, _ in found))
        before = sum(entry_bytes(cache.spec) for cache, _, _ in found)
        rounded = sum(self._entry_bytes(cache, per_channel) for cache, per_channel, _ in found)
        return PassResult(program, editor.sites, notes={"cache_bytes_per_token": [before, rounded]})

    def _check(self, cache: Cache) -> None:
        if cache.head_dim % self.group_size or cache.head_dim % (8 // min(self._bits(True), self.bits)):
            raise PassError(
                f"A head of {cache.head_dim} channels is not cut into groups of {self.group_size}",
                where=describe(cache.write),
                fix="Choose a group_size that divides it, and a multiple of 4 channels",
            )

    def _bits(self, per_channel: bool) -> int:
        """Of keys, which are rounded per channel, or of values."""
        return self.key_bits or self.bits if per_channel else self.bits

    def _specs(self, cache: Cache, per_channel: bool) -> list[StateSpec]:
        name, (batch, heads, slots, width) = cache.spec.name, cache.spec.shape
        channels = int(cast("int", width))
        groups = (
            (batch, heads, "key_groups", channels)
            if per_channel
            else (batch, heads, slots, channels // self.group_size)
        )
        return [
            StateSpec(f"{name}_codes", torch.uint8, (batch, heads, slots, channels * self._bits(per_channel) // 8)),
            StateSpec(f"{name}_scale", torch.float16, groups),
            StateSpec(f"{name}_zero", torch.float16, groups),
            StateSpec(f"{name}_residual", cache.spec.dtype, (batch, heads, self.residual + 1, channels)),
        ]

    def _entry_bytes(self, cache: Cache, per_channel: bool) -> float:
        """Bytes of a rounded token: codes, and its part of scales and zeros."""
        return cache.kv_heads * cache.head_dim * (self._bits(per_channel) / 8 + 4 / self.group_size)

    def _rewrite(self, editor: Editor, cache: Cache, per_channel: bool, node: fx.Node, state: list[fx.Node]) -> None:
        options = (self._bits(per_channel), self.group_size, per_channel)
        read = editor.call(kivi_read, *state, cache.new, cache.slots, cache.end, *options, before=node)
        # After the read: new tokens see the past as it was.
        editor.call(kivi_update, *state, cache.new, cache.slots, *options, before=node)
        editor.program.graph.erase_node(cache.write)
        editor.replace(cache.read, read, f"{options[0]} bits")
        editor.program.graph.erase_node(cache.read)
