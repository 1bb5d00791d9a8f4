"""Caches in int8, int4 and FP8: smaller state, rounding per token and head, any chunking, rings, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.kv_cache.caching import greedy, prompts, rewritten

from graphwright.errors import PassError
from graphwright.feeding import logits_in_chunks
from graphwright.numerics import relative_error
from graphwright.ops import dequantize_tokens, quantize_tokens
from graphwright.ops.quantize_tokens import FORMATS

STEP = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8_e4m3": 2.0**-4}
"""Largest error of one entry against the largest of its head; FP8 keeps 3 bits behind the leading one."""


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    width=st.sampled_from([2, 16, 64, 80]),
    exponent=st.integers(-20, 20),
)
def test_rounding_is_within_half_a_step(format, shape, width, exponent):
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(exponent + 40)) * 2.0**exponent
    codes, scale = quantize_tokens(x, format)
    found = dequantize_tokens(codes, scale, format, torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    assert ((found - x).abs() <= STEP[format] * largest * (1 + 1e-5)).all()
    assert codes.element_size() * codes.shape[-1] == width * (4 if format == "int4" else 8) // 8


@pytest.mark.parametrize("format", FORMATS)
def test_state_is_smaller_by_the_formula(format):
    program = rewritten("llama", "static_cache", {"quantized_cache": {"format": format}})
    sizes = {"batch": 2, "capacity": 33}
    before = rewritten("llama", "static_cache").contract.allocate(sizes)
    after = program.contract.allocate(sizes)
    bytes_before, bytes_after = (sum(t.nbytes for t in state.values()) for state in (before, after))
    per_head = 16 * (0.5 if format == "int4" else 1) + 4
    assert bytes_after == bytes_before * per_head / (16 * 4)
    assert not any(t.dtype == torch.float32 and t.shape[-1] > 1 for t in after.values())


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_int8_stays_close_and_does_not_depend_on_chunks(name):
    static = rewritten(name, "static_cache")
    program = rewritten(name, "static_cache", {"quantized_cache": {"format": "int8"}})
    ids = torch.tensor(prompts(13, 13))
    whole = logits_in_chunks(program, ids, None, [13])
    exact = logits_in_chunks(static, ids, None, [13])
    if name != "gemma3":  # what a ring's layer sees of its own chunk is not rounded yet
        for ends in ([1, 2, 7, 13], range(1, 14)):
            assert relative_error(logits_in_chunks(program, ids, None, list(ends)), whole) < 1e-4
    stepped = logits_in_chunks(program, ids, None, list(range(1, 14)))
    error = float((stepped - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.1, "the tiny random models turn small differences into larger ones"


@pytest.mark.parametrize("format", FORMATS)
def test_the_graph_computes_what_the_formula_says(format):
    """Static caches whose entries were rounded by hand as they were written."""
    program = rewritten("llama", "static_cache", {"quantized_cache": {"format": format}})
    plain = rewritten("llama", "static_cache")
    for node in plain.calls(torch.ops.graphwright.kv_cache_update.default):
        with plain.graph.inserting_before(node):
            made = plain.graph.call_function(lambda x: _rounded(x, format), (node.args[1],))
        node.args = (node.args[0], made, node.args[2])
    plain.module.recompile()
    ids = torch.tensor(prompts(9, 9))
    found = logits_in_chunks(program, ids, None, [4, 5, 9])
    assert relative_error(found, logits_in_chunks(plain, ids, None, [4, 5, 9])) < 1e-5


def _rounded(x: torch.Tensor, format: str) -> torch.Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    if format == "fp8_e4m3":
        return (x / (largest / 448)).to(torch.float8_e4m3fn).float() * (largest / 448)
    levels = {"int8": 127, "int4": 7}[format]
    return (x / (largest / levels)).round() * (largest / levels)


def test_ragged_prompts_generate_what_they_generate_alone():
    program = rewritten("qwen2", "static_cache", {"quantized_cache": {"format": "int8"}})
    asked = prompts(5, 1, 11)
    together = greedy(program, asked, 6)
    assert together == [greedy(program, [prompt], 6)[0] for prompt in asked]


def test_the_error_is_measured_and_reported():
    program = rewritten("llama", "static_cache", {"quantized_cache": {"format": "int4"}}, verify=True)
    record = program.history[-1]
    assert record.name == "quantized_cache"
    assert record.error > 1e-3
    assert record.notes["kl"] > 0
    assert record.notes["cache_bytes_per_token"] == [2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * (8 + 4)]


def test_a_head_that_cannot_be_packed_is_refused():
    from passes.kv_cache.caching import CPU

    from graphwright.pass_ import Context
    from graphwright.passes.kv_cache.quantized_cache import QuantizedCache

    program = rewritten("llama", "static_cache")
    for index, spec in enumerate(program.contract.state):
        program.contract = program.contract.with_(
            state=(
                *program.contract.state[:index],
                type(spec)(spec.name, spec.dtype, (*spec.shape[:3], 15)),
                *program.contract.state[index + 1 :],
            )
        )
    with pytest.raises(PassError, match="packs 2 channels into whole bytes, and a head has 15"):
        QuantizedCache(format="int4").run(program, Context(CPU))


GOLDEN = """\
%29 = quantize_tokens(%28, int8) : (int8[batch, 2, sequence, 16], float32[batch, 2, sequence, 1])
%30 = getitem(%29, 0) : int8[batch, 2, sequence, 16]
%31 = getitem(%29, 1) : float32[batch, 2, sequence, 1]
%32 = kv_cache_update(%key_cache_0_codes, %30, %positions) : None
%33 = kv_cache_update(%key_cache_0_scale, %31, %positions) : None
%34 = slice.Tensor(%key_cache_0_codes, 2, 0, %11) : int8[batch, 2, keys, 16]
%35 = slice.Tensor(%key_cache_0_scale, 2, 0, %11) : float32[batch, 2, keys, 1]
%36 = dequantize_tokens(%34, %35, int8, float32) : float32[batch, 2, keys, 16]
"""


def test_the_text_of_one_cache():
    assert GOLDEN in rewritten("llama", "static_cache", "quantized_cache").text()
