"""Paged and quantized caches on GPUs: what lowering makes of them, its numbers, its kernels, and their machine code."""

import pytest
import torch
from backends.test_triton_lowering import OnKernels, counts
from families.configs import build as build_model
from passes.kv_cache.caching import rewritten

import graphwright
from graphwright.backend import coverage
from graphwright.backends.triton import BACKEND, caches, lowering, plan, store
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.feeding import logits_in_chunks, token_inputs
from graphwright.kernels.triton.decode_attention import MOST_ROWS, split_attention
from graphwright.kernels.triton.device import DEVICES
from graphwright.numerics import relative_error
from graphwright.ops import attention, dequantize_tokens, kivi_read, kv_cache_update, quantize_tokens
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import GPUS, Target

PAGED = {"paged_cache": {"block_size": 4}}
LAYOUTS = {
    "paged": (PAGED,),
    "int8": ("quantized_cache",),
    "int4": ({"quantized_cache": {"format": "int4"}},),
    "fp8": ({"quantized_cache": {"format": "fp8_e4m3"}},),
    "int8 paged": ("quantized_cache", PAGED),
    "kivi": ({"kivi_cache": {"group_size": 8, "residual": 16, "key_bits": 4}},),
}


def made(layout: str, family: str = "llama") -> Program:
    return rewritten(family, "static_cache", *LAYOUTS[layout], "select_logits")


def left(program: Program) -> dict[str, str]:
    return coverage(program, BACKEND, GPUS["cuda:sm_90"]).reasons


def logits(program: Program) -> torch.Tensor:
    """Of a ragged batch: a prompt that split attention serves, one that it does not, and a step."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 120, (2, 56), generator=generator), torch.ones(2, 56, dtype=torch.int64)
    mask[1, 40:] = 0
    assert MOST_ROWS < 44 * 4 // 2
    return logits_in_chunks(program, ids, mask, [11, 55, 56])[mask.bool()]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "kivi"])
def test_attention_reads_the_cache_where_it_lies(layout):
    program = made(layout)
    lowered = lowering.lower(program)
    found, layers = counts(lowered), len(list(program.calls(attention.target)))
    assert found["cached_attention"] == layers
    update = "paged_cache_update" if layout == "paged" else "quantized_cache_update"
    assert found[update] == 2 * layers
    gone = {"attention", "quantize_tokens", "dequantize_tokens", "kv_cache_update", "paged_update", "paged_read"}
    assert not gone & set(found)
    assert found["rotate"] == layers, "keys are turned as they are written"
    assert not gone & set(left(program))
    assert torch.equal(logits(lowered), logits(program))


def test_attention_reads_a_window_in_floating_point_beside_codes():
    program = made("kivi")
    lowered = lowering.lower(program)
    found, layers = counts(lowered), len(list(program.calls(attention.target)))
    assert found["attend_kivi_cache"] == layers
    assert found["kivi_cache_update"] == 2 * layers
    assert found["token_spans"] == 1, "what a token's place follows from is found once for all layers"
    gone = {"attention", "kivi_read", "kivi_update", "read_kivi_cache"}
    assert not gone & {*found, *left(program)}
    assert torch.equal(logits(lowered), logits(program))


def test_a_cache_of_kivi_that_something_else_reads_is_read_first():
    program = made("kivi")
    read = next(iter(program.calls(kivi_read.target)))
    with program.graph.inserting_after(read):
        program.graph.call_function(kv_cache_update.target, (read, *read.args[4:6]))
    found = counts(lowering.lower(program))
    assert found["read_kivi_cache"] == 2
    assert found["attend_kivi_cache"] == found["kivi_cache_update"] // 2 - 1


@pytest.mark.parametrize(("target", "read"), [("rocm:gfx942", "*u8"), ("cuda:sm_90", "*fp8e4nv")])
def test_fp8_caches_are_read_as_bits_where_the_type_is_another(target, read):
    """The fp8 of gfx942 is e4m3fnuz, whose bits stand for other numbers: kernels there decode e4m3 themselves."""
    program = made("fp8")
    assert not {"attention", "quantize_tokens", "dequantize_tokens"} & set(
        coverage(program, BACKEND, GPUS[target]).reasons
    )
    found = plan.launches(lowering.lower(program, DEVICES[target]), DEVICES[target])
    kinds = {dict(launch.problem().types)["key_ptr"] for launch in found if launch.kernel is split_attention}
    assert kinds == {read}


PAGED_TEXT = """\
paged_cache_update(%key_pool_0, %21, %positions, %block_table, %11, model.rotary_emb.inv_freq, 1.0, False) : None
paged_cache_update(%value_pool_0, %24, %positions, %block_table, None, None, 1.0, False) : None
cached_attention(%25, %key_pool_0, None, %value_pool_0, None, %block_table, %9, , %positions, %10, None, None, None, \
0.25, True, 0, 0, 0, 0.0, 0, 0) : float32[batch, 4, sequence, 16]
"""


def test_the_text_of_a_layer_in_blocks():
    lines = (line.partition(" = ")[2] for line in lowering.lower(made("paged")).text().splitlines())
    assert "\n".join([line for line in lines if "_pool_0" in line]) == PAGED_TEXT.strip()


# A step for either attention kernel is enough once: the interpreter is slow.
@pytest.mark.parametrize(
    ("layout", "length"), [("paged", 5), ("int8 paged", 5), ("fp8", 3), ("int4", 34), ("kivi", 21)]
)
def test_the_kernels_compute_what_the_program_does(layout, length):
    program = made(layout)
    lowered = lowering.lower(program)
    planned = {launch.problem() for launch in plan.launches(lowered, OnKernels.device)}
    ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    inputs = token_inputs(program, ids, mask)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = program(**inputs)[0]
    machine = OnKernels(lowered, planned)
    actual = machine.run(*(copies[name] for name in program.contract.names))[0]
    # A rotated key may differ in its last bit, and then a code by one.
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < (2e-3 if layout == "paged" else 5e-2)
    assert machine.launched > 10


def test_rings_of_windows_are_read_in_floating_point():
    program = made("int8 paged", "gemma3")
    lowered = lowering.lower(program)
    found = counts(lowered)
    assert found["read_cache"] == 2 * found["attention"] > 0
    assert found["cached_attention"] > 0
    assert not {"quantize_tokens", "dequantize_tokens", "paged_read"} & {*left(program), *found}
    assert torch.equal(logits(lowered), logits(program))


def test_what_kernels_do_not_serve_says_why():
    class Rounding(torch.nn.Module):
        def forward(self, x):
            return dequantize_tokens(*quantize_tokens(x, "int8"), "int8", torch.float64)

    program = capture(Rounding(), (torch.randn(2, 2, 3, 16),))
    assert "do not go to the same slots of two caches" in left(program)["quantize_tokens"]
    assert "no kernel reads codes as torch.float64" in left(program)["dequantize_tokens"]
    assert set(counts(lowering.lower(program))) >= {"quantize_tokens", "dequantize_tokens"}


def test_a_cache_that_is_written_in_between_is_not_read_later():
    program = made("int8")
    node = next(iter(program.calls(attention.target)))
    key, _ = caches.attended(node)
    state = key.codes.args[0]
    with program.graph.inserting_before(node):
        program.graph.call_function(
            kv_cache_update.target, (state, state, program.graph.find_nodes(op="placeholder")[1])
        )
    assert caches.attended(node) is None


@pytest.mark.slow
def test_a_model_with_an_int4_cache_in_pages_becomes_machine_code(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = build_model("llama", num_hidden_layers=1).to(torch.bfloat16)
    passes = ["static_cache", {"quantized_cache": {"format": "int4"}}, "paged_cache", "select_logits"]
    recipe = Recipe.load({"name": "paged", "passes": passes})
    program = rewrite(capture(model), recipe, Target.parse("cpu"), CompileOptions(verify=False))
    compiled = graphwright.compile(program, "none", "cuda:sm_90", verify=False)
    entries = store.read(compiled.folder / "kernels", "cuda:sm_90")
    kernels = {entry.problem.kernel for entry in entries}
    assert {"quantize_and_store", "read_tokens", "split_attention", "join_splits", "flash_attention"} <= kernels
    assert compiled.report.coverage["lowered"]["attention"] == 1
    for entry in entries:
        assert entry.resources.spills == 0
        assert not [reason for reason in entry.refused.values() if "Error" in reason]
        if entry.problem.kernel == "split_attention":
            assert entry.resources.matrix
