"""How semantic ops become ATen that Inductor compiles well, in two forms.

`decode` is for one token of one sequence: everything is a walk over weights and cache, written as reductions.
`general` is for any number of tokens: matrix products and the flash kernel. Rows sorted by expert are known only at run
time; an op over them stands for itself, and its own kernel is called. A semantic op without an entry is
lowered to its reference.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphwright.backends.inductor.attention import attention_by_flash, attention_by_reduction
from graphwright.backends.inductor.barrier import realize
from graphwright.backends.inductor.experts import experts_by_reduction, quantized_experts_by_reduction
from graphwright.backends.inductor.linear import dequantize, linear, quantized_linear, quantized_matmul
from graphwright.backends.inductor.spqr import spqr_by_parts, spqr_matmul
from graphwright.op import op_of
from graphwright.ops import experts, grouped_linear, quantized_experts

aten = torch.ops.aten

Form = Literal["decode", "general"]
Lowering = Callable[..., Any]


def lowering(target: Any, form: Form) -> Lowering:
    """What to trace instead of `target`; `target` itself if Inductor knows it."""
    op = op_of(target)
    table = LOWERINGS.get(target if op is None else op.name)
    if table is not None:
        return table[form]
    return target if op is None else op.reference


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float = 1.0, interleaved: bool = False) -> Tensor:
    """The reference, with the table in a buffer and no concatenation with nothing."""
    angles = positions[:, None, :, None].float() * inv_freq.float()
    cos, sin = (realize((part * scaling).to(x.dtype)) for part in (angles.cos(), angles.sin()))
    rotary = 2 * inv_freq.shape[0]
    if interleaved:
        first, second = x[..., 0:rotary:2], x[..., 1:rotary:2]
    else:
        first, second = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        rotated = torch.stack(turned, -1).flatten(-2)
        return rotated if rotary == x.shape[-1] else torch.cat([rotated, x[..., rotary:]], -1)
    return torch.cat(turned if rotary == x.shape[-1] else (*turned, x[..., rotary:]), -1)


def kv_cache_update(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Writes by index; padding goes to the scratch slot."""
    batch, heads = new.shape[:2]
    rows = torch.arange(batch, device=cache.device)[:, None, None]
    columns = torch.arange(heads, device=cache.device)[None, :, None]
    places = torch.where(slots < 0, cache.shape[2] - 1, slots)[:, None, :]
    cache.index_put_((rows, columns, places), new.to(cache.dtype))


def quantized_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantizes the rows asked for, by shifts."""
    chosen = indices.reshape(-1)
    zero = None if zero_point is None else zero_point[chosen]
    dense = dequantize(weight[chosen], scale[chosen], zero, format, group_size)
    return dense[:, :embedding_dim].to(dtype).view(*indices.shape, embedding_dim)


LOWERINGS: Mapping[Any, Mapping[Form, Lowering]] = {
    "spqr_linear": {"decode": spqr_by_parts, "general": spqr_matmul},
    "attention": {"decode": attention_by_reduction, "general": attention_by_flash},
    "experts": {"decode": experts_by_reduction, "general": experts},
    "grouped_linear": {"decode": grouped_linear, "general": grouped_linear},
    "kv_cache_update": {"decode": kv_cache_update, "general": kv_cache_update},
    "quantized_embedding": {"decode": quantized_embedding, "general": quantized_embedding},
    "quantized_experts": {"decode": quantized_experts_by_reduction, "general": quantized_experts},
    "quantized_linear": {"decode": quantized_linear, "general": quantized_matmul},
    "rope": {"decode": rope, "general": rope},
    aten.linear.default: {"decode": linear, "general": aten.linear.default},
}
"""Lowerings of semantic ops by name, and of ATen ops by overload."""


class Lowered(nn.Module):
    """Runs a region's graph with every op lowered; tracing it gives the graph that Inductor compiles."""

    def __init__(self, graph: fx.Graph, form: Form) -> None:
        super().__init__()
        self.graph = graph
        self.form: Form = form
        self.at = ""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The region's outputs; state among the inputs is written in place."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "call_function":
                self.at = node.meta.get("where", self.at)
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = self._call(node, args, kwargs)
        self.at = ""
        return tuple(realize(values[node]) for node in self.graph.output_node().args[0])

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = node.args[0] if node.args else None
        if node.target is aten.slice.Tensor and isinstance(source, fx.Node) and source.meta.get("state"):
            prefix = _prefix(*args, **kwargs)
            if prefix is not None:
                return prefix
        form: Form = "decode" if node.meta.get("few") else self.form
        return lowering(node.target, form)(*args, **kwargs)


def _prefix(
    state: Tensor, dim: int = 0, start: int | None = None, end: int | torch.SymInt | None = None, step: int = 1
) -> Tensor | None:
    """The first `end` entries of a cache, without asking whether it has that many: the contract says so."""
    if start or step != 1 or not isinstance(end, torch.SymInt):
        return None
    shape = list(state.shape)
    shape[dim] = end  # type: ignore[call-overload]
    return torch.as_strided(state, shape, state.stride())
