"""int8 and float16 caches in the TVM backend: inside cache write and attention kernels, equal to the eager program."""

import re
from dataclasses import replace

import pytest
import torch
import tvm
from families.cache import captured
from passes.kv_cache.caching import greedy

import graphwright
from graphwright.backend import choose, coverage
from graphwright.backends.inductor import BACKEND as INDUCTOR
from graphwright.backends.tvm import BACKEND
from graphwright.backends.tvm.build import build_kernels, translate
from graphwright.backends.tvm.fusion import plan_fusion
from graphwright.kernels.tir.emit import Layout
from graphwright.kernels.tir.rope import Rotation, update_cache
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


HALVES = ("half_cache",)


def codes(format: str) -> tuple:
    """The pass that makes caches of this format."""
    return ({"quantized_cache": {"format": format}},)


def rewritten(name: str, layout: tuple = codes("int8")) -> Program:
    recipe = Recipe.load({"passes": ["static_cache", *layout, "select_logits"]})
    program = captured(name)[1]
    return PassManager(Context(CPU), verify=False).run(program, plan_passes(recipe, program))


@pytest.mark.parametrize("layout", [codes("int8"), HALVES], ids=["int8", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prefill_and_a_decode_step_equal_the_eager_program(name, layout, tmp_path):
    """Grouped heads with rope, and rings of a sliding window."""
    program = rewritten(name, layout)
    assert not coverage(program, BACKEND, CPU).reasons
    prepared = BACKEND.prepare(program, CPU)
    run = BACKEND.compile(prepared, CPU, tmp_path, lambda _text, _fraction: None)
    states = [program.contract.allocate({"batch": 1, "capacity": 32}) for _ in range(2)]
    ids = torch.randint(0, 100, (1, 20), generator=torch.Generator().manual_seed(4))
    for start, end in ((0, 18), (18, 19), (19, 20)):
        step = {
            "input_ids": ids[:, start:end],
            "positions": torch.arange(start, end)[None],
            "key_positions": torch.arange(end),
            "logit_index": torch.arange(end - start)[None],
        }
        found, expected = run({**step, **states[0]})[0], prepared(**step, **states[1])[0]
        # A last-bit difference may round a key to the next code, or half.
        assert float((found - expected).norm() / expected.norm()) < (5e-3 if layout is not HALVES else 5e-4)
    for name, one in states[0].items():
        difference = (one[:, :, :-1].float() - states[1][name][:, :, :-1].float()).abs()
        step = {torch.int8: 1, torch.float16: 2.0**-11 * one.float().abs().max()}
        assert difference.max() <= step.get(one.dtype, 1e-4)


def test_roundings_and_dequantized_caches_are_inside_other_kernels():
    program = BACKEND.prepare(rewritten("llama"), CPU)
    fusion = plan_fusion(program)
    assert len(fusion.codes) == len(fusion.held) == 4
    rotated = [node for node in fusion.codes if node in fusion.rope]
    assert len(rotated) == 2, "keys are rotated as they are rounded"


def test_other_formats_have_no_kernel_and_the_report_says_so():
    program = rewritten("llama", codes("int4"))
    backend, passed_over = choose(program, CPU, [BACKEND, INDUCTOR])
    assert backend is INDUCTOR
    assert "caches in int4 have no kernel" in passed_over["tvm"]


def test_halves_are_read_by_attentions_themselves():
    program = BACKEND.prepare(rewritten("llama", HALVES), CPU)
    fusion = plan_fusion(program)
    assert len(fusion.widened) == 4
    assert len(fusion.rope) == 2, "keys are rotated as they are written"
    module, _ = translate(program, CPU, ["general"])
    assert not re.search(r'astype\(.*dtype="float32"\)', str(module))


def test_latents_in_halves_are_keys_and_values_at_once(tmp_path):
    program = rewritten("deepseek_v3", ("latent_attention", *HALVES))
    prepared = BACKEND.prepare(program, CPU)
    fusion = plan_fusion(prepared)
    assert len(fusion.widened) == len(program.contract.state)


@pytest.mark.parametrize("features", [(), ("avx2", "fma")], ids=str)
def test_halves_are_linked_for_machines_with_and_without_their_instructions(features, tmp_path):
    """Where there is no conversion instruction, LLVM calls a function of the compiler's library."""
    shape, slots = (1, 2, 5, 20), (1, 5)
    layouts = [Layout.contiguous(s) for s in (shape, shape, slots)]
    write = update_cache(Rotation(), *layouts, None, "float16").with_attr("global_symbol", "write")
    library = build_kernels(tvm.IRModule({"write": write}), replace(CPU, features=features))
    library.export_library(str(tmp_path / "kernels.so"))
    loaded = tvm.runtime.load_module(str(tmp_path / "kernels.so"))
    new, held = torch.randn(shape) * 1000, torch.zeros(shape, dtype=torch.float16)
    loaded["write"](new, torch.arange(5)[None], held)
    assert torch.equal(held, new.half())


def test_tokens_with_halves_are_those_of_the_reference_program():
    program = captured("llama")[1]
    compiled = graphwright.compile(program, {"passes": ["static_cache", *HALVES, "select_logits"]}, verify=False)
    assert compiled.backend == "tvm"
    asked = [[5, 6, 7, 8, 9], [8], [17, 3, 4]]
    found = compiled.generate(asked, max_new_tokens=8, eos_token_ids=()).tokens
    assert found == greedy(rewritten("llama", HALVES), asked, 8)


def test_an_artifact_with_int8_caches_generates_after_loading(tmp_path):
    program = captured("llama")[1]
    recipe = {"passes": ["static_cache", "quantized_cache", "select_logits"]}
    compiled = graphwright.compile(program, recipe, verify=False)
    assert compiled.backend == "tvm"
    expected = compiled.generate([[5, 6, 7], [8]], max_new_tokens=6, eos_token_ids=()).tokens
    compiled.save(tmp_path / "tiny")
    loaded = graphwright.load(tmp_path / "tiny")
    assert loaded.generate([[5, 6, 7], [8]], max_new_tokens=6, eos_token_ids=()).tokens == expected
    held = loaded.program.contract.allocate({"batch": 1, "capacity": 8})
    assert {tensor.dtype for tensor in held.values()} == {torch.int8, torch.float32}
