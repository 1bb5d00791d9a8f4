"""int8 caches in the TVM backend: fused into cache write and attention kernels, equal to the eager program."""

import pytest
import torch
from families.cache import captured

import graphwright
from graphwright.backend import choose, coverage
from graphwright.backends.inductor import BACKEND as INDUCTOR
from graphwright.backends.tvm import BACKEND
from graphwright.backends.tvm.fusion import plan_fusion
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")


def rewritten(name: str, format: str = "int8") -> Program:
    recipe = Recipe.load({"passes": ["static_cache", {"quantized_cache": {"format": format}}, "select_logits"]})
    program = captured(name)[1]
    return PassManager(Context(CPU), verify=False).run(program, plan_passes(recipe, program))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prefill_and_a_decode_step_equal_the_eager_program(name, tmp_path):
    """Grouped heads with rope, and rings of a sliding window."""
    program = rewritten(name)
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
        # A last-bit difference may round a key to the next code.
        assert float((found - expected).norm() / expected.norm()) < 5e-3
    for name, one in states[0].items():
        difference = (one[:, :, :-1].float() - states[1][name][:, :, :-1].float()).abs()
        assert difference.max() <= 1 if one.dtype == torch.int8 else difference.max() < 1e-4


def test_roundings_and_dequantized_caches_are_inside_other_kernels():
    program = BACKEND.prepare(rewritten("llama"), CPU)
    fusion = plan_fusion(program)
    assert len(fusion.codes) == len(fusion.held) == 4
    rotated = [node for node in fusion.codes if node in fusion.rope]
    assert len(rotated) == 2, "keys are rotated as they are rounded"


def test_other_formats_have_no_kernel_and_the_report_says_so():
    program = rewritten("llama", "int4")
    backend, passed_over = choose(program, CPU, [BACKEND, INDUCTOR])
    assert backend is INDUCTOR
    assert "caches in int4 have no kernel" in passed_over["tvm"]


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
