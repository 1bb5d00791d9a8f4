"""Rotary embedding, and writing the result or anything else into a cache, in one pass.

Su et al. 2021, arXiv:2104.09864. The table of angles is never stored: sines are computed where they are used. A cache
lies in rows, or in blocks found through a table (Kwon et al. 2023, arXiv:2309.06180).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import BackendError
from graphwright.kernels.triton.cache_codes import slot_offset
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    cdiv,
    check_device,
    dense,
    fixed,
    meta,
    next_power_of_2,
    strides,
)
from graphwright.kernels.triton.rounding import sine_and_cosine


@triton.jit
def rotate_and_store(
    x_ptr, positions_ptr, inv_freq_ptr, slots_ptr, table_ptr, out_ptr,
    heads, length, pages, x_b, x_h, x_s, positions_b, out_b, out_h, out_s, scaling,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head: rotated channels in pairs, then the channels that pass unchanged."""
    batch_head = tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < length
    source = x_ptr + batch * x_b + head * x_h + token.to(tl.int64) * x_s
    place = token.to(tl.int64)
    if slots_ptr is not None:
        place = tl.load(slots_ptr + batch * length + token, mask=present, other=-1)
        stored = present & (place >= 0)
    else:
        stored = present
    place, stored = slot_offset(place, table_ptr, batch, pages, out_b, out_s, stored, PAGE)
    target = out_ptr + head * out_h + place
    if ROTARY > 0:
        pair = tl.arange(0, BLOCK_PAIRS)
        turning = pair < ROTARY // 2
        inside = present[:, None] & turning[None, :]
        position = tl.load(positions_ptr + batch * positions_b + token, mask=present, other=0).to(tl.float32)
        angle = position[:, None] * tl.load(inv_freq_ptr + pair, mask=turning, other=0.0)[None, :]
        if INTERLEAVED:
            first, second = 2 * pair, 2 * pair + 1
        else:
            first, second = pair, pair + ROTARY // 2
        x = tl.load(source[:, None] + first[None, :], mask=inside, other=0.0)
        y = tl.load(source[:, None] + second[None, :], mask=inside, other=0.0)
        # The reference rounds the table to the dtype of the activations.
        sine, cosine = sine_and_cosine(angle)
        cosine = (cosine * scaling).to(x.dtype).to(tl.float32)
        sine = (sine * scaling).to(x.dtype).to(tl.float32)
        x, y = x.to(tl.float32), y.to(tl.float32)
        kept = stored[:, None] & turning[None, :]
        kind = out_ptr.dtype.element_ty
        tl.store(target[:, None] + first[None, :], (x * cosine - y * sine).to(kind), mask=kept)
        tl.store(target[:, None] + second[None, :], (y * cosine + x * sine).to(kind), mask=kept)
    if ROTARY < HEAD_DIM:
        channel = ROTARY + tl.arange(0, BLOCK_REST)
        passing = channel < HEAD_DIM
        rest = tl.load(source[:, None] + channel[None, :], mask=present[:, None] & passing[None, :], other=0.0)
        kept = stored[:, None] & passing[None, :]
        tl.store(target[:, None] + channel[None, :], rest.to(out_ptr.dtype.element_ty), mask=kept)


def _launch(
    run: Runner,
    x: Tensor,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    slots: Tensor | None,
    out: Tensor,
    scaling: float,
    interleaved: bool,
    table: Tensor | None = None,
) -> None:
    check_device(x=x, positions=positions, inv_freq=inv_freq, slots=slots, table=table, out=out)
    batch, heads, length, head_dim = x.shape
    rotary = 0 if inv_freq is None else 2 * inv_freq.shape[0]
    if rotary > head_dim:
        raise BackendError(f"inv_freq turns {rotary} channels and the head has {head_dim}")
    source = dense(x)
    if out.stride(-1) != 1:
        raise BackendError("The last dimension of a cache must be dense", where=f"strides {out.stride()}")
    pairs, rest = next_power_of_2(rotary // 2), next_power_of_2(head_dim - rotary)
    arguments: dict[str, Any] = {
        "x_ptr": source, "positions_ptr": None if positions is None else positions.contiguous(),
        "inv_freq_ptr": None if inv_freq is None else inv_freq.float().contiguous(),
        "slots_ptr": None if slots is None else slots.contiguous(),
        "table_ptr": None if table is None else table.contiguous(), "out_ptr": out,
        "heads": heads, "length": length, "pages": 0 if table is None else table.shape[1], "scaling": float(scaling),
        "positions_b": 0 if positions is None or positions.shape[0] == 1 else length,
        **strides("x", source, "bhs"), **strides("out", out, "bhs"),
    }  # fmt: skip
    run(
        Launch(
            rotate_and_store,
            arguments,
            {
                "HEAD_DIM": head_dim, "ROTARY": rotary, "INTERLEAVED": interleaved,
                "PAGE": 0 if table is None else out.shape[2],
            },
            tuple(Config.of(num_warps=4, BLOCK_TOKENS=t, BLOCK_PAIRS=pairs, BLOCK_REST=rest) for t in (1, 4, 16, 32)),
            lambda c: (cdiv(length, c["BLOCK_TOKENS"]), batch * heads),
            lambda c: Work(8 * c["BLOCK_TOKENS"] * head_dim, 2 * c["BLOCK_TOKENS"] * head_dim * x.element_size()),
            static=fixed(head_dim, "x_b", "x_h", "x_s", "out_b", "out_h", "out_s"),
        )
    )  # fmt: skip


def rope(
    run: Runner, x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float = 1.0, interleaved: bool = False
) -> Tensor:
    """See `graphwright.ops.rope`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(run, x, positions, inv_freq, None, out, scaling, interleaved)
    return out


def kv_cache_update(run: Runner, cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """See `graphwright.ops.kv_cache_update`; entries with a negative slot are not written at all."""
    _launch(run, new, None, None, slots, cache, 1.0, False)


def rope_cache_update(
    run: Runner,
    cache: Tensor,
    x: Tensor,
    slots: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """`kv_cache_update(cache, rope(x, …), slots)` without storing the rotated keys twice."""
    _launch(run, x, positions, inv_freq, slots, cache, scaling, interleaved)


def paged_update(
    run: Runner,
    pool: Tensor,
    x: Tensor,
    slots: Tensor,
    table: Tensor,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """`graphwright.ops.paged_update(pool, rope(x, …), slots, table)`; what has no slot or block is not written at all.

    With `inv_freq` None, x is written as it is.
    """
    _launch(run, x, positions, inv_freq, slots, pool, scaling, interleaved, table)


def _keys(dtype: torch.dtype, length: int = 512) -> Tensor:
    return meta(dtype, 4, length, 8, 128).transpose(1, 2)


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "head_dim 128": lambda run, dtype: rope(
        run, _keys(dtype), meta(torch.int64, 4, 512), meta(torch.float32, 64)
    ),
    "head_dim 128, partial": lambda run, dtype: rope(
        run, _keys(dtype), meta(torch.int64, 4, 512), meta(torch.float32, 32)
    ),
    "cache write": lambda run, dtype: rope_cache_update(
        run, meta(dtype, 4, 8, 1025, 128), _keys(dtype), meta(torch.int64, 4, 512), meta(torch.int64, 4, 512),
        meta(torch.float32, 64),
    ),
    "write into blocks": lambda run, dtype: paged_update(
        run, meta(dtype, 513, 8, 16, 128), _keys(dtype), meta(torch.int64, 4, 512), meta(torch.int64, 4, 64),
        meta(torch.int64, 4, 512), meta(torch.float32, 64),
    ),
    "cache write of values": lambda run, dtype: kv_cache_update(
        run, meta(dtype, 4, 8, 1025, 128), _keys(dtype), meta(torch.int64, 4, 512)
    ),
}  # fmt: skip
