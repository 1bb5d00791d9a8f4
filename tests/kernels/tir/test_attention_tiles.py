"""Attention in tile registers against the op's reference, and against the kernel that it stands in for."""

import re
from dataclasses import replace

import pytest
import torch
import tvm
from kernels.tir.running import HOST, compiled, dense, nowhere, size

from graphwright.backends.tvm.build import build_kernels
from graphwright.kernels.tir import attention_tiles as kernels
from graphwright.kernels.tir import attention_vectors as vectors
from graphwright.kernels.tir.attention import FEW, Attention, Operands
from graphwright.kernels.tir.isa import choose
from graphwright.numerics import relative_error
from graphwright.ops import attention, dequantize_tokens, quantize_tokens

HERE = choose(HOST.features).tiles
needs_tiles = pytest.mark.skipif(not HERE, reason="this machine has no AMX")

TOLERANCE = 2e-4
"""Elementwise: parts of 16 bits lack 2**-17 of scores as large as 10, and exp multiplies that."""

CASES = [
    # heads, kv_heads, head_dim, value_dim, how keys and values are kept, and options of the op
    (9, 3, 64, 64, "float32", {"causal": True}),
    (4, 4, 80, 80, "float16", {"causal": True, "window": 40, "anchors": 3}),
    (8, 1, 96, 48, "float32", {"causal": True, "softcap": 20.0, "alibi": True, "sinks": True}),
    (4, 2, 128, 16, "int8", {"causal": False, "chunk": 50}),
    (2, 2, 32, 32, "float32", {"causal": False}),
]

SIZES = [
    # sequences, queries, keys, keys that hold nothing yet
    (1, 9, 9, 0),
    (2, 37, 70, 0),
    (1, 150, 200, 40),
    (2, 300, 300, 3),
]


def operands(a: Attention, kept: str = "float32") -> Operands:
    b, s, t = size("batch"), size("sequence"), size("keys")
    held = [dense(b, a.kv_heads, t, width) for width in (a.head_dim, a.value_dim)]
    scales = [dense(b, a.kv_heads, t, 1)] * 2 if kept == "int8" else [None] * 2
    return Operands(
        dense(b, a.heads, s, a.head_dim), *held, dense(b, s), dense(b, t), *scales, key_dtype=kept, value_dtype=kept
    )


def described(heads: int, kv_heads: int, head_dim: int, value_dim: int, kept: str, options: dict):
    known = {"alibi": False, "sinks": False} | options
    return Attention(heads, kv_heads, head_dim, value_dim, head_dim**-0.5, **known)


def drawn(a: Attention, sizes: tuple, kept: str = "float32") -> tuple[list[torch.Tensor], torch.Tensor]:
    """The kernel's arguments, and what the op makes of them."""
    batch, queries, keys, empty = sizes
    torch.manual_seed(queries)
    query = torch.randn(batch, a.heads, queries, a.head_dim)
    held = [torch.randn(batch, a.kv_heads, keys, width) for width in (a.head_dim, a.value_dim)]
    plain, scales = held, []
    if kept == "float16":
        held = [tensor.half() for tensor in held]
        plain = [tensor.float() for tensor in held]
    if kept == "int8":
        held, scales = zip(*(quantize_tokens(tensor, "int8") for tensor in held), strict=True)
        plain = [dequantize_tokens(*both, "int8", torch.float32) for both in zip(held, scales, strict=True)]
    filled = keys - empty
    query_at = torch.arange(filled - queries, filled)[None].repeat(batch, 1)
    key_at = torch.arange(keys)[None].repeat(batch, 1)
    key_at[:, filled:] = -1
    if batch > 1:
        # A shorter sequence, padded on the left.
        query_at[1], key_at[1] = query_at[1] - 2, key_at[1] - 2
        query_at[1], key_at[1] = query_at[1].clamp_min(-1), key_at[1].clamp_min(-1)
    slopes = torch.rand(a.heads) if a.alibi else None
    sinks = torch.randn(a.heads) if a.sinks else None
    rest = (a.scale, a.causal, a.window, a.chunk, a.prefix, a.softcap, a.anchors)
    expected = attention(query, *plain, query_at, key_at, None, slopes, sinks, *rest)
    return [query, *held, *scales, query_at, key_at, *(x for x in (slopes, sinks) if x is not None)], expected


@needs_tiles
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case):
    a, kept = described(*case), case[4]
    call = compiled(kernels.prefill(a, operands(a, kept), 3))
    for sizes in SIZES:
        given, expected = drawn(a, sizes, kept)
        out = nowhere(sizes[0], sizes[1], a.heads, a.value_dim)
        call(*given, out)
        assert relative_error(out.transpose(1, 2), expected) < TOLERANCE, sizes


@needs_tiles
def test_few_queries_are_those_of_the_kernel_in_vector_registers():
    a = described(*CASES[0])
    given, _ = drawn(a, (2, FEW, 70, 0))
    outs = []
    for module in (kernels, vectors):
        outs.append(nowhere(2, FEW, a.heads, a.value_dim))
        compiled(module.prefill(a, operands(a), 3))(*given, outs[-1])
    assert torch.equal(*outs)


@needs_tiles
def test_what_keys_beyond_the_filled_ones_hold_does_not_matter():
    a = described(*CASES[0])
    call, found = compiled(kernels.prefill(a, operands(a), 3)), []
    for junk in (0.0, 1e4):
        given, _ = drawn(a, (1, 40, 130, 60))
        for held in given[1:3]:
            held[:, :, 70:] = junk
        found.append(nowhere(1, 40, a.heads, a.value_dim))
        call(*given, found[-1])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "served"), [(64, 64, True), (80, 48, True), (72, 64, False), (64, 20, False)]
)
def test_head_sizes_that_fill_no_register_are_left_to_vectors(head_dim, value_dim, served):
    assert kernels.serves(described(4, 2, head_dim, value_dim, "float32", {"causal": True})) is served


def test_machine_code_multiplies_tiles_of_bfloat16():
    """Compiled for a machine that need not be this one."""
    features = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "amx_int8", "amx_bf16")
    target = replace(HOST, arch="x86_64", features=features)
    a = described(*CASES[-1])
    function = kernels.prefill(a, operands(a), 3).with_attr("global_symbol", "kernel")
    code = build_kernels(tvm.IRModule({"kernel": function}), target).inspect_source("asm")
    assert len(re.findall("tdpbf16ps", code)) >= 12
    assert "tilerelease" in code
