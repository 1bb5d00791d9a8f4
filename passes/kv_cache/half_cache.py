"""Caches in half precision: keys and values as float16, whatever the model computes in.

    before                                            after
    kv_cache_update(cache, k, slots)                  kv_cache_update(cache_float16, k, slots)
    y = attention(q, cache[:T], …)                    y = attention(q, float32(cache_float16[:T]), …)

A token is rounded as it is written, to 11 significant bits; products and softmax stay in float32. The state is half as
large, and so is what a decode step reads of it. A ring of a sliding window reads the tokens of its own call as they
are, and rounded ones afterwards. The largest number that a half holds is 65504: keys beyond it would become infinite,
which the measured error shows. No paper: it is what inference engines have as the plain choice of cache.

Caches that are no wider than float16 are left as they are. The TVM backend reads and writes halves in its attention and
cache kernels; others convert them before their attention.
"""

import torch
from torch import fx

from graphwright.contract import StateSpec
from graphwright.ops import kv_cache_update
from graphwright.pass_ import Context, PassResult
from graphwright.passes.kv_cache._layout import Cache, CacheLayout, entry_bytes, find_caches
from graphwright.program import Program
from graphwright.rewrite import Editor, extend_contract

aten = torch.ops.aten


class HalfCache(CacheLayout):
    """Key and value caches in float16."""

    name = "half_cache"
    kind = "approximate"
    provides = ("half_cache",)
    conflicts = ("quantized_cache", "kivi_cache", "kvquant_cache", "evicting_cache", "streaming_cache")

    @property
    def streamed(self) -> int:
        """The error does not depend on chunks; a few drawn tokens do."""
        return 48

    def run(self, program: Program, context: Context) -> PassResult:
        """Halves every cache in float32.

        Raises:
            PassError: a cache is used in a way that is not known.
        """
        found = [cache for cache in find_caches(program) if cache.spec.dtype == torch.float32]
        specs = tuple(_halved(cache.spec) for cache in found)
        inputs = extend_contract(program, state=specs)
        with Editor(program, self.name) as editor:
            for cache, spec in zip(found, specs, strict=True):
                _rewrite(editor, cache, inputs[spec.name])
        extend_contract(program, drop=tuple(cache.spec.name for cache in found))
        before, after = (sum(map(entry_bytes, held)) for held in ([cache.spec for cache in found], specs))
        return PassResult(program, editor.sites, notes={"cache_bytes_per_token": [before, after]})


def _halved(spec: StateSpec) -> StateSpec:
    return StateSpec(f"{spec.name}_float16", torch.float16, spec.shape)


def _rewrite(editor: Editor, cache: Cache, half: fx.Node) -> None:
    """Writes and reads the half instead of the cache."""
    editor.call(kv_cache_update, half, cache.new, cache.slots, before=cache.write)
    held = editor.call(aten.slice.Tensor, half, *cache.read.args[1:], before=cache.read)
    value = editor.call(aten.to.dtype, held, cache.spec.dtype, before=cache.read)
    editor.program.graph.erase_node(cache.write)
    editor.replace(cache.read, value, "float16")
    editor.program.graph.erase_node(cache.read)
