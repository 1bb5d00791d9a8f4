"""Quantized caches: keys and values as codes of 8 or 4 bits, with one scale per token and head.

    before                                            after
    kv_cache_update(cache, k, slots)                  codes, scale = quantize_tokens(k)
    y = attention(q, cache[:T], …)                    kv_cache_update(cache_codes, codes, slots)
                                                      kv_cache_update(cache_scale, scale, slots)
                                                      y = attention(q, dequantize_tokens(cache_codes[:T], …), …)

A token is rounded as it is written and everybody, itself included, reads what was rounded, so results do not depend on
how a text is cut into chunks. Formats: int8, int4 (two codes to a byte), fp8_e4m3. Symmetric per-token scales are the
plain scheme of FlexGen's and vLLM's low-bit caches (Sheng et al. 2023, arXiv:2303.06865 use groups of channels; here a
head is the group). The TVM backend reads and writes int8 in its attention and cache kernels; other formats are
dequantized in memory.
"""

import operator
from typing import Literal

import torch
from pydantic import Field
from torch import fx

from graphwright import packing
from graphwright.contract import StateSpec
from graphwright.errors import PassError
from graphwright.ops import dequantize_tokens, kv_cache_update, quantize_tokens
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.kv_cache._layout import Cache, CacheLayout, entry_bytes, find_caches
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract

aten = torch.ops.aten


class QuantizedCache(CacheLayout):
    """Key and value caches in int8, int4 or FP8."""

    name = "quantized_cache"
    kind = "approximate"
    paper = Paper("FlexGen: High-Throughput Generative Inference with a Single GPU", "Sheng et al.", 2023, "2303.06865")
    provides = ("quantized_cache",)
    conflicts = ("quantized_cache", "kivi_cache", "kvquant_cache", "evicting_cache")

    format: Literal["int8", "int4", "fp8_e4m3"] = Field("int8", description="of the codes")

    @property
    def streamed(self) -> int:
        """The error does not depend on chunks; a few drawn tokens do."""
        return 48

    def run(self, program: Program, context: Context) -> PassResult:
        """Rounds what every cache holds.

        Raises:
            PassError: a cache is used in a way that is not known, or its heads cannot be packed.
        """
        found = find_caches(program)
        unit = packing.FORMATS[self.format].unit
        for cache in found:
            if cache.head_dim % unit:
                raise PassError(
                    f"{self.format} packs {unit} channels into whole bytes, and a head has {cache.head_dim}",
                    where=describe(cache.write),
                    fix="Use format int8",
                )
        before = sum(entry_bytes(cache.spec) for cache in found)
        specs = tuple(spec for cache in found for spec in self._specs(cache))
        inputs = extend_contract(program, state=specs)
        with Editor(program, self.name) as editor:
            for cache, (codes, scale) in zip(found, zip(specs[::2], specs[1::2], strict=True), strict=True):
                self._rewrite(editor, cache, inputs[codes.name], inputs[scale.name])
        extend_contract(program, drop=tuple(cache.spec.name for cache in found))
        after = sum(map(entry_bytes, specs))
        return PassResult(program, editor.sites, notes={"cache_bytes_per_token": [before, after]})

    def _specs(self, cache: Cache) -> tuple[StateSpec, StateSpec]:
        kind, (batch, heads, slots, width) = packing.FORMATS[self.format], cache.spec.shape
        codes = (batch, heads, slots, int(width) * kind.bits // 8)
        return (
            StateSpec(f"{cache.spec.name}_codes", kind.storage, codes),
            StateSpec(f"{cache.spec.name}_scale", torch.float32, (batch, heads, slots, 1)),
        )

    def _rewrite(self, editor: Editor, cache: Cache, codes: fx.Node, scale: fx.Node) -> None:
        rounded = editor.call(quantize_tokens, cache.new, self.format, before=cache.write)
        parts = []
        for index, state in enumerate((codes, scale)):
            part = editor.call(operator.getitem, rounded, index, before=cache.write)
            parts.append((state, part))
        for state, part in parts:
            editor.call(kv_cache_update, state, part, cache.slots, before=cache.write)
        held = [editor.call(aten.slice.Tensor, s, *cache.read.args[1:], before=cache.read) for s in (codes, scale)]
        value = editor.call(dequantize_tokens, *held, self.format, cache.spec.dtype, before=cache.read)
        editor.program.graph.erase_node(cache.write)
        editor.replace(cache.read, value, self.format)
        editor.program.graph.erase_node(cache.read)
