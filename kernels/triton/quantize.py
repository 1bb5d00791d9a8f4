"""Rounding to low-bit codes on the GPU: activations to int8 or fp8 per token or group, weights to packed int4 groups.

The codes are those of `graphwright.ops.quantize_dequantize` and the layout that of `graphwright.packing`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright import packing
from graphwright.errors import BackendError
from graphwright.kernels.triton.launch import (
    Config,
    Launch,
    Runner,
    Work,
    cdiv,
    check_device,
    fixed,
    meta,
    next_power_of_2,
    rows_of,
)
from graphwright.kernels.triton.norm import LARGEST_ROW
from graphwright.kernels.triton.rounding import encode_e4m3, round_half_even

ROUNDED = ("int8", "fp8_e4m3")
"""Formats that activations are rounded to."""


@triton.jit
def quantize_groups(
    x_ptr, static_scale_ptr, codes_ptr, scale_ptr, groups, x_row,
    GROUPS_PER_ROW: tl.constexpr, GROUP_SIZE: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Groups of consecutive activations, each with its own scale, or all with one that was measured before."""
    group = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    item = tl.arange(0, BLOCK_SIZE)
    inside = (group[:, None] < groups) & (item[None, :] < GROUP_SIZE)
    row, column = group // GROUPS_PER_ROW, group % GROUPS_PER_ROW * GROUP_SIZE
    source = row.to(tl.int64)[:, None] * x_row + column[:, None] + item[None, :]
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if static_scale_ptr is None:
        # A group of zeros has no scale of its own; any will do, and this is the reference's.
        scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), axis=1), LARGEST * 1.0), 1.1754943508222875e-38)
        tl.store(scale_ptr + group, scale, mask=group < groups)
        step = tl.broadcast_to(scale[:, None], x.shape)
    else:
        step = tl.broadcast_to(tl.load(static_scale_ptr).to(tl.float32), x.shape)
    scaled = tl.minimum(tl.maximum(tl.math.div_rn(x, step), -LARGEST * 1.0), LARGEST * 1.0)
    if FP8:
        codes = encode_e4m3(scaled)
    else:
        codes = round_half_even(scaled).to(tl.int32)
    target = group.to(tl.int64)[:, None] * GROUP_SIZE + item[None, :]
    tl.store(codes_ptr + target, codes.to(codes_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pack_int4_groups(
    weight_ptr, packed_ptr, scale_ptr, zero_ptr, groups,
    GROUP_SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Asymmetric min-max codes of every group: the first half in the low nibbles, the second in the high ones."""
    group = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    item = tl.arange(0, BLOCK_HALF)
    half: tl.constexpr = GROUP_SIZE // 2
    inside = (group[:, None] < groups) & (item[None, :] < half)
    first = group.to(tl.int64)[:, None] * GROUP_SIZE + item[None, :]
    low = tl.load(weight_ptr + first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(weight_ptr + first + half, mask=inside, other=0.0).to(tl.float32)
    # Zero stays inside the range, so that a padded group has a code for it.
    smallest = tl.minimum(tl.minimum(tl.min(low, axis=1), tl.min(high, axis=1)), 0.0)
    largest = tl.maximum(tl.maximum(tl.max(low, axis=1), tl.max(high, axis=1)), 0.0)
    scale = tl.maximum(tl.math.div_rn(largest - smallest, 15.0), 1.1754943508222875e-38)
    zero = tl.minimum(round_half_even(tl.math.div_rn(-smallest, scale)), 15.0)
    step, origin = tl.broadcast_to(scale[:, None], low.shape), zero[:, None]
    low_codes = tl.minimum(tl.maximum(round_half_even(tl.math.div_rn(low, step)) + origin, 0.0), 15.0).to(tl.int32)
    high_codes = tl.minimum(tl.maximum(round_half_even(tl.math.div_rn(high, step)) + origin, 0.0), 15.0).to(tl.int32)
    target = group.to(tl.int64)[:, None] * half + item[None, :]
    tl.store(packed_ptr + target, (low_codes | (high_codes << 4)).to(tl.uint8), mask=inside)
    tl.store(scale_ptr + group, scale, mask=group < groups)
    tl.store(zero_ptr + group, zero, mask=group < groups)


def quantize(
    run: Runner, x: Tensor, scale: Tensor | None, format: str, group_size: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Int8 codes, or bits of e4m3 as uint8, [..., K], and float32 scales [..., K / group_size], or [..., 1] per token.

    With a static `scale` [] that scale is returned as it is.

    Raises:
        BackendError: a format without a kernel, or a group that does not divide K or is too large.
    """
    if format not in ROUNDED:
        raise BackendError(f"No kernel rounds activations to {format}", fix=f"There are {', '.join(ROUNDED)}")
    width = x.shape[-1]
    size = group_size or width
    if width % size:
        raise BackendError(f"Groups of {size} do not divide rows of {width}")
    if size > LARGEST_ROW:
        raise BackendError(f"Groups of {size} are rounded by no kernel", fix=f"The widest there is takes {LARGEST_ROW}")
    check_device(x=x, scale=scale)
    flat = rows_of(x)
    per_row = width // size
    groups = flat.shape[0] * per_row
    kind = packing.FORMATS[format]
    codes = torch.empty(x.shape, dtype=kind.storage, device=x.device)
    steps = torch.empty((*x.shape[:-1], per_row), dtype=torch.float32, device=x.device) if scale is None else scale
    run(
        Launch(
            quantize_groups,
            {"x_ptr": flat, "static_scale_ptr": scale, "codes_ptr": codes,
             "scale_ptr": steps if scale is None else None, "groups": groups, "x_row": flat.stride(0)},
            {"GROUPS_PER_ROW": per_row, "GROUP_SIZE": size, "LARGEST": int(kind.largest),
             "FP8": kind.dtype is not None},
            _configs(size, "BLOCK_SIZE"),
            lambda c: (cdiv(groups, c["BLOCK_GROUPS"]),),
            lambda c: Work(4 * c["BLOCK_GROUPS"] * size, c["BLOCK_GROUPS"] * size * (x.element_size() + 1)),
            static=fixed(width, "x_row"),
        )
    )  # fmt: skip
    return codes, steps


def pack_int4(run: Runner, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes [N, K / 2], scales and zero points float32 [N, K / group_size] of a weight [N, K].

    Raises:
        BackendError: a group that is odd, too large, or does not divide K.
    """
    outputs, width = weight.shape
    if group_size % 2 or width % group_size or group_size > LARGEST_ROW:
        raise BackendError(
            f"Groups of {group_size} cannot be packed from rows of {width}",
            fix=f"A group must be even, divide the row, and be at most {LARGEST_ROW}",
        )
    groups = outputs * width // group_size
    packed = torch.empty(outputs, width // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(outputs, width // group_size, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    run(
        Launch(
            pack_int4_groups,
            {"weight_ptr": weight.contiguous(), "packed_ptr": packed, "scale_ptr": scale, "zero_ptr": zero,
             "groups": groups},
            {"GROUP_SIZE": group_size},
            _configs(group_size // 2, "BLOCK_HALF"),
            lambda c: (cdiv(groups, c["BLOCK_GROUPS"]),),
            lambda c: Work(
                8 * c["BLOCK_GROUPS"] * group_size,
                c["BLOCK_GROUPS"] * group_size * (weight.element_size() + 0.5),
            ),
        )
    )  # fmt: skip
    return packed, scale, zero


def _configs(size: int, name: str) -> tuple[Config, ...]:
    block = next_power_of_2(size)
    tiles = [Config.of(num_warps=4, BLOCK_GROUPS=max(1, 2048 // block), **{name: block})]
    if block > 2048:
        tiles += [Config.of(num_warps=warps, BLOCK_GROUPS=1, **{name: block}) for warps in (8, 16)]
    return tuple(tiles)


def quantize_reference(
    x: Tensor, scale: Tensor | None, format: str, group_size: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scales whose product is `quantize_dequantize(x)`."""
    kind = packing.FORMATS[format]
    grouped = x.float().unflatten(-1, (-1, group_size or x.shape[-1]))
    largest = grouped.abs().amax(-1, keepdim=True)
    step = (largest / kind.largest).clamp_min(torch.finfo(torch.float32).tiny) if scale is None else scale.float()
    scaled = (grouped / step).clamp(-kind.largest, kind.largest)
    codes = scaled.round().to(torch.int8) if kind.dtype is None else scaled.to(kind.dtype).view(torch.uint8)
    codes = codes.reshape(x.shape)
    return codes, step.squeeze(-1) if scale is None else scale


def pack_int4_reference(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Min-max codes through `packing.pack`."""
    grouped = weight.float().unflatten(-1, (-1, group_size))
    smallest, largest = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scale = ((largest - smallest) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-smallest / scale).round().clamp_max(15)
    codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return packing.pack(codes.flatten(-2), "int4", group_size), scale, zero


SHAPES: Mapping[str, Callable[[Runner, torch.dtype], Any]] = {
    "int8 per token 4096": lambda run, dtype: quantize(run, meta(dtype, 512, 4096), None, "int8", 0),
    "fp8 per token 4096": lambda run, dtype: quantize(run, meta(dtype, 512, 4096), None, "fp8_e4m3", 0),
    "int8 per group 128": lambda run, dtype: quantize(run, meta(dtype, 512, 4096), None, "int8", 128),
    "pack int4 group 128": lambda run, dtype: pack_int4(run, meta(dtype, 4096, 4096), 128),
}
