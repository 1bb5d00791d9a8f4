"""The ops that a lowered program calls: on a GPU they launch kernels, on a CPU they are the reference.

Each is a `torch.library` custom op of its own namespace, so lowered programs run, export and compile like any other;
on AMD GPUs PyTorch calls the device `cuda` as well. Which runner a launch goes to is decided by whoever runs the
program: `using(runner)` for binaries compiled ahead of time, and Triton's just-in-time compiler where nobody says.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright import ops
from graphwright.errors import TargetError
from graphwright.kernels.triton import (
    activation,
    decode_attention,
    embedding,
    flash_attention,
    grouped_gemm,
    integer_gemm,
    norm,
    quantize,
    quantized_gemm,
    rope,
    sampling,
    sparse_gemm,
)
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import JustInTime, Runner
from graphwright.kernels.triton.model import rank
from graphwright.target import GPUS, local_gpu

NAMESPACE = "graphwright_triton"

OPS: dict[Any, "TritonOp"] = {}
"""Every op by its overload."""

_runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


@dataclass(frozen=True)
class TritonOp:
    """An op with two faces: what it means, and how it is launched."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]

    @property
    def target(self) -> Any:
        """The overload that appears in graphs."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


@contextmanager
def using(runner: Runner) -> Iterator[None]:
    """Launches of the ops inside the block go to `runner`."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


_just_in_time: dict[str, JustInTime] = {}


def current_runner() -> Runner:
    """Where launches go now.

    Raises:
        TargetError: no runner was named, and the GPU at hand is none that kernels are configured for.
    """
    named = _runner.get()
    if named is not None:
        return named
    name = local_gpu()
    if name is None or name not in GPUS:
        raise TargetError(f"No kernel is configured for this GPU, {name}", fix=f"Known: {', '.join(GPUS)}")
    device = Device.of(GPUS[name])
    return _just_in_time.setdefault(name, JustInTime(device, lambda launch, where: rank(launch, where)[0]))


def define(launch: Callable[..., Any], *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], TritonOp]:
    """Registers the decorated reference as an op that `launch` serves on a GPU."""

    def register(reference: Callable[..., Any]) -> TritonOp:
        name = reference.__name__
        custom = torch.library.custom_op(
            f"{NAMESPACE}::{name}", reference, mutates_args=mutates, device_types="cpu"
        )  # fmt: skip
        custom.register_kernel("cuda")(lambda *args: launch(current_runner(), *args))
        # References allocate what they return, so they are their own shape functions where no value is looked at.
        custom.register_fake(reference)
        made = TritonOp(name, reference, launch)
        OPS[made.target] = made
        return made

    return register


@define(norm.rms_norm)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False) -> Tensor:
    """See `graphwright.ops.rms_norm`."""
    return _own(ops.rms_norm.reference(x, weight, eps, unit_offset), x)


@define(norm.add_rms_norm)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    total = x + residual
    return total, _own(ops.rms_norm.reference(total, weight, eps, unit_offset), total)


@define(norm.rms_norm_quantize)
def rms_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norm as codes and scales."""
    return norm.rms_norm_quantize_reference(x, weight, eps, unit_offset)


@define(norm.add_rms_norm_quantize)
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its norm as codes and scales."""
    total = x + residual
    return total, *norm.rms_norm_quantize_reference(total, weight, eps, unit_offset)


@define(norm.layer_norm)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last dimension."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@define(activation.gated_activation)
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `graphwright.ops.gated_activation`."""
    return ops.gated_activation.reference(gate, up, activation).contiguous()


@define(activation.gated_activation_quantize)
def gated_activation_quantize(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The product as codes and scales."""
    return _gate_codes(gate, up, activation)


_gate_codes = activation.gated_activation_quantize_reference


def _quantize(run: Runner, x: Tensor, scale: Tensor | None, format: str, group_size: int) -> tuple[Tensor, Tensor]:
    codes, steps = quantize.quantize(run, x, scale, format, group_size)
    # A custom op must not return its argument.
    return codes, steps if scale is None else steps.clone()


@define(_quantize)
def quantize_activations(x: Tensor, scale: Tensor | None, format: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `graphwright.ops.quantize_dequantize`."""
    codes, steps = quantize.quantize_reference(x, scale, format, group_size)
    return codes.contiguous(), steps.clone() if scale is not None else steps


@define(rope.rope)
def rotate(
    x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float = 1.0, interleaved: bool = False
) -> Tensor:  # fmt: skip
    """See `graphwright.ops.rope`."""
    return _own(ops.rope.reference(x, positions, inv_freq, scaling, interleaved), x)


@define(rope.kv_cache_update, mutates=("cache",))
def kv_cache_update(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """See `graphwright.ops.kv_cache_update`."""
    ops.kv_cache_update.reference(cache, new, slots)


@define(rope.rope_cache_update, mutates=("cache",))
def rope_cache_update(
    cache: Tensor,
    x: Tensor,
    slots: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Rotates and writes into the cache."""
    rotated = ops.rope.reference(x, positions, inv_freq, scaling, interleaved)
    ops.kv_cache_update.reference(cache, rotated, slots)


def _attend(run: Runner, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    kernel = decode_attention if rows <= decode_attention.MOST_ROWS else flash_attention
    return kernel.attention(run, query, key, value, *rest)


@define(_attend)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    softcap: float = 0.0,
    anchors: int = 0,
    block: int = 0,
) -> Tensor:
    """See `graphwright.ops.attention`; split over the keys for few queries, by blocks of queries for many."""
    out = flash_attention.empty_result(query, value.shape[3])
    if isinstance(query, torch._subclasses.FakeTensor):
        return out
    arguments = (query_positions, key_positions, bias, alibi_slopes, sinks, scale, causal, window, chunk, prefix)
    return out.copy_(ops.attention.reference(query, key, value, *arguments, softcap, anchors, block))


@define(flash_attention.packed_attention)
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    softcap: float = 0.0,
    anchors: int = 0,
    block: int = 0,
) -> Tensor:
    """Attention within sequences that lie one after the other; see `flash_attention.packed_attention`."""
    if isinstance(query, torch._subclasses.FakeTensor):
        return query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    options = (scale, causal, window, chunk, prefix, softcap, anchors, block)
    return flash_attention.packed_reference(
        query, key, value, query_offsets, key_offsets, alibi_slopes, sinks, *options
    )  # fmt: skip


@define(quantized_gemm.quantized_linear)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """See `graphwright.ops.quantized_linear`."""
    return _own(ops.quantized_linear.reference(x, weight, scale, zero_point, bias, format, group_size), x)


@define(integer_gemm.linear)
def integer_linear(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """(codes * x_scale) @ dequantize(weight).T + bias, multiplied as integers."""
    return integer_gemm.linear_reference(codes, x_scale, weight, scale, zero_point, bias, format, group_size, dtype)


@define(sparse_gemm.linear)
def sparse_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
) -> Tensor:
    """`graphwright.ops.sparse_linear` of layout `2:4`."""
    arguments = (x, values, places, scale, zero_point, bias, "2:4", format, group_size, places.shape[0])
    return _own(ops.sparse_linear.reference(*arguments), x)


@define(grouped_gemm.grouped_linear)
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `graphwright.ops.grouped_linear`."""
    if isinstance(x, torch._subclasses.FakeTensor):
        return x.new_empty(x.shape[0], weight.shape[2])
    result: Tensor = ops.grouped_linear.reference(x, weight, ends)
    return result


@define(embedding.quantized_embedding)
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
    """See `graphwright.ops.quantized_embedding`."""
    if isinstance(indices, torch._subclasses.FakeTensor):
        return torch.empty((*indices.shape, embedding_dim), dtype=dtype, device=weight.device)
    looked_up = ops.quantized_embedding.reference(
        indices, weight, scale, zero_point, format, group_size, embedding_dim, dtype
    )
    return looked_up.contiguous()


@define(sampling.sample_tokens)
def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:  # fmt: skip
    """See `graphwright.ops.sample_tokens`; no graph has it, the executable calls it on logits that stay on the GPU."""
    if isinstance(logits, torch._subclasses.FakeTensor):
        return logits.new_empty(logits.shape[0], dtype=torch.int64)
    tokens: Tensor = ops.sample_tokens.reference(logits, uniform, temperature, top_k, top_p, min_p)
    return tokens


def _own(result: Tensor, source: Tensor) -> Tensor:
    """A contiguous result that is no view of an argument, as a custom op must return."""
    dense = result.contiguous()
    return dense.clone() if dense is source else dense
