"""Paged caches: one pool of blocks for all sequences, found through block tables.

    before                                            after
    kv_cache_update(cache, k, positions)              paged_update(pool, k, positions, block_table)
    y = attention(q, cache[:T], …)                    y = attention(q, paged_read(pool, block_table, T), …)

A sequence takes blocks as it grows, wherever they are free, and sequences that begin alike share them (Kwon et al.
2023, arXiv:2309.06180); who has which is the business of `graphwright.engine.paging`. It applies to whatever lies in
slots: caches as they are, in halves (after `half_cache`) or int8 (after `quantized_cache`), or DeepSeek's latent ones.
Rings of windows stay in rows. Blocks are gathered at every step; there is no CPU kernel that reads them in place.
"""

import torch
from pydantic import Field
from torch import fx

from graphwright.contract import Dim, InputSpec, StateSpec
from graphwright.errors import PassError
from graphwright.feeding import logits_in_chunks
from graphwright.numerics import relative_error
from graphwright.ops import paged_read, paged_update
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.kv_cache._layout import Cache, CacheLayout, entry_bytes, find_caches
from graphwright.program import Program
from graphwright.rewrite import Editor, extend_contract


class PagedCache(CacheLayout):
    """Blocks and block tables."""

    name = "paged_cache"
    kind = "structural"
    paper = Paper(
        "Efficient Memory Management for Large Language Model Serving with PagedAttention", "Kwon et al.", 2023,
        "2309.06180",
    )  # fmt: skip
    provides = ("paged_cache",)
    after = ("quantized_cache", "kvquant_cache", "half_cache")
    conflicts = ("paged_cache", "kivi_cache", "evicting_cache")

    block_size: int = Field(16, ge=1, description="tokens in a block")

    def run(self, program: Program, context: Context) -> PassResult:
        """Moves every cache that grows into pools.

        Raises:
            PassError: there is none.
        """
        found = [cache for cache in find_caches(program) if cache.grows]
        if not found:
            raise PassError("No cache grows with the text, so none has pages", fix="Leave paged_cache out")
        longest = program.contract.dim("keys").max
        specs = [self._spec(cache) for cache in found]
        inputs = extend_contract(
            program,
            inputs=(InputSpec("block_table", torch.int64, ("batch", "table"), "block_table", self.block_size),),
            state=tuple(specs),
            dims=(Dim("table", 1, -(-longest // self.block_size)), Dim("blocks", 2)),
        )
        with Editor(program, self.name) as editor:
            for cache, spec in zip(found, specs, strict=True):
                _rewrite(editor, cache, inputs[spec.name], inputs["block_table"])
        extend_contract(program, drop=tuple(cache.spec.name for cache in found))
        held = any("capacity" in spec.shape for spec in program.contract.state)
        dims = tuple(dim for dim in program.contract.dims if held or dim.name != "capacity")
        program.contract = program.contract.with_(dims=dims)
        bytes_per_token = sum(entry_bytes(cache.spec) for cache in found)
        return PassResult(program, editor.sites, notes={"block_bytes": bytes_per_token * self.block_size})

    def verify(self, before: Program, after: Program, context: Context) -> float:
        """Compares a text in chunks and steps that cross the ends of blocks."""
        token = before.contract.input("token")
        length = min(2 * self.block_size + 3, 40, before.contract.dim("sequence").max)
        ids = torch.randint(0, max(token.high, 2) if token else 2, (2, length), generator=context.generator())
        ends = sorted({max(1, length // 2), max(1, length - 1), length})
        return relative_error(*(logits_in_chunks(program, ids, None, ends) for program in (after, before)))

    def _spec(self, cache: Cache) -> StateSpec:
        _, heads, _, width = cache.spec.shape
        name = cache.spec.name.replace("_cache_", "_pool_")
        return StateSpec(name, cache.spec.dtype, ("blocks", heads, self.block_size, width))


def _rewrite(editor: Editor, cache: Cache, pool: fx.Node, table: fx.Node) -> None:
    editor.call(paged_update, pool, cache.new, cache.slots, table, before=cache.write)
    value = editor.call(paged_read, pool, table, cache.end, before=cache.read)
    editor.program.graph.erase_node(cache.write)
    editor.replace(cache.read, value, "paged")
    editor.program.graph.erase_node(cache.read)
