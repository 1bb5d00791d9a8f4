"""Multi-head latent attention over its latent: keys and values are never made, the cache holds what they come from.

    before                                            after
    nope, v = split(linear(latent, W))                q = cat(matmul(q_nope, W_k), q_rope)       [B, H, S, c + r]
    k = cat(nope, expand(k_rope))                     k = cat(latent, k_rope)                    [B, 1, S, c + r]
    y = attention(cat(q_nope, q_rope), k, v)          z = attention(q, k, k[..., :c])            [B, H, S, c]
                                                      y = matmul(z, W_v)

The scores q_nope · (W_k latent) are (W_kᵀ q_nope) · latent, and sums of W_v latent are W_v of sums, so the rows of W
move to the query and to the output, once for each head (DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434). Exact.
`static_cache` then stores one vector of c + r numbers per token and layer, where all heads had their own keys and
values; decode reads that much less. A prompt costs more products than before, as heads are c + r wide. The two parts
of W are products of their own now, which weight quantization leaves as they are.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ops import attention
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


class LatentAttention(Pass):
    """Absorbs the up-projection of keys and values (MLA)."""

    name = "latent_attention"
    kind = "exact"
    paper = Paper(
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", "DeepSeek-AI", 2024,
        "2405.04434",
    )  # fmt: skip
    requires = ("attention", "grouped_heads", "linear", "rope")
    provides = ("latent_attention",)
    after = ("float_dtype",)
    conflicts = ("latent_attention",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every attention whose keys and values come from one latent; others are left alone, with a reason."""
        misses = []
        with Editor(program, self.name, context.fuel) as editor:
            for node in list(program.calls(attention.target)):
                found = _match(node)
                if isinstance(found, str):
                    misses.append(f"{found} at {node.name}")
                elif editor.allow(node):
                    _absorb(editor, node, found)
        return PassResult(program, editor.sites, near_misses=misses[:3])


@dataclass(frozen=True)
class _Latent:
    """What is known of one attention: W [H * (n + v), c] over `latent`, and the parts of query and key."""

    query: fx.Node
    query_rope: fx.Node
    latent: fx.Node
    key_rope: fx.Node
    weight: fx.Node
    nope_dim: int
    value_dim: int
    heads: int


def _match(node: fx.Node) -> _Latent | str:
    """The parts of an attention over a latent, or why it is none."""
    query, key, value = _arguments(node)[:3]
    if any(part.target is not aten.cat.default or len(part.args[0]) != 2 for part in (query, key)):
        return "queries and keys are not two parts each"
    heads = int(query.meta["val"].shape[1])
    (query_nope, query_rope), (key_nope, expanded) = query.args[0], key.args[0]
    if expanded.target is not aten.expand.default or expanded.args[0].meta["val"].shape[1] != 1:
        return "the rotated part of the keys is not shared by all heads"
    if any(part.target is not operator.getitem for part in (key_nope, value)):
        return "keys and values are not parts of one tensor"
    split = key_nope.args[0]
    if split is not value.args[0] or split.target is not aten.split_with_sizes.default:
        return "keys and values are not parts of one tensor"
    if (key_nope.args[1], value.args[1]) != (0, 1) or len(split.args[1]) != 2:
        return "keys do not come before values"
    made = _product(split.args[0])
    if isinstance(made, str):
        return made
    latent, weight = made
    nope_dim, value_dim = (int(size) for size in split.args[1])
    if int(query_nope.meta["val"].shape[3]) != nope_dim:
        return "the parts of queries and keys have different widths"
    if int(weight.meta["val"].shape[0]) != heads * (nope_dim + value_dim):
        return "the up-projection does not make all heads"
    return _Latent(query_nope, query_rope, latent, expanded.args[0], weight, nope_dim, value_dim, heads)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _product(heads: fx.Node) -> tuple[fx.Node, fx.Node] | str:
    """Latent and weight of [B, H, S, n + v] = transpose(reshape(linear(latent, weight)))."""
    if heads.target is not aten.transpose.int or set(heads.args[1:]) != {1, 2}:
        return "heads are not the third dimension of a product"
    product: Any = heads.args[0].args[0] if heads.args[0].target is aten.reshape.default else None
    if product is None or product.target is not aten.linear.default:
        return "keys and values are no product in floating point"
    if len(product.args) > 2 and product.args[2] is not None:
        return "the up-projection has a bias"
    if product.args[1].op != "get_attr":
        return "the up-projection is not stored"
    return product.args[0], product.args[1]


def _absorb(editor: Editor, node: fx.Node, found: _Latent) -> None:
    weight = editor.program.weight(found.weight).unflatten(0, (found.heads, -1))
    up_key, up_value = weight.split([found.nope_dim, found.value_dim], 1)
    name = str(found.weight.target).removesuffix(".weight")

    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        return editor.call(target, *args, before=node, **kwargs)

    key_weight = editor.weight(f"{name}_keys", up_key.contiguous(), before=node)
    value_weight = editor.weight(f"{name}_values", up_value.transpose(1, 2).contiguous(), before=node)
    query = call(aten.cat.default, [call(aten.matmul.default, found.query, key_weight), found.query_rope], -1)
    latent, shape = found.latent, found.key_rope.meta["val"].shape
    if latent.meta["val"].dim() == 3:
        latent = call(aten.unsqueeze.default, latent, 1)
    rank = int(latent.meta["val"].shape[3])
    key = call(aten.cat.default, [latent, found.key_rope], len(shape) - 1)
    value = call(aten.slice.Tensor, key, 3, 0, rank)
    mixed = call(attention, query, key, value, *node.args[3:], **node.kwargs)
    editor.replace(node, call(aten.matmul.default, mixed, value_weight), f"{found.heads} heads over {rank}")
