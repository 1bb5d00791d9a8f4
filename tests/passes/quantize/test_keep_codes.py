"""Checkpoints compiled as they are: codes reach the program bit for bit, siblings are merged, tokens are the model's."""

import pytest
import torch
from interchange.making import logits
from interchange.test_gguf import LINEAR, write
from interchange.test_gptq import checkpoint
from rich.console import Console

import graphwright
from graphwright.capture import capture
from graphwright.errors import PassError, RecipeError
from graphwright.interchange.packed import Packed, PackedLinear
from graphwright.manager import plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import quantized_embedding, quantized_linear
from graphwright.recipe import Recipe
from graphwright.report.collect import collect
from graphwright.report.terminal import print_report
from graphwright.sources import open_model
from graphwright.target import Target

PROMPTS = [[5, 17, 40, 9], [77, 3]]


def greedy(model, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def check(compiled, reference) -> None:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    assert relative_error(compiled.logits(ids), logits(reference)) < 1e-4
    found = compiled.generate(PROMPTS, max_new_tokens=6).tokens
    assert found == [greedy(reference, prompt, 6) for prompt in PROMPTS]


def test_a_gguf_file_runs_with_its_codes(tmp_path):
    kinds = {**dict.fromkeys(LINEAR, "Q4_0"), "v_proj": "Q8_0", "embed_tokens": "Q6_K"}
    reference = write(tmp_path / "tiny.gguf", kinds, tied=True)
    compiled = graphwright.compile(str(tmp_path / "tiny.gguf"), "as-is")
    assert compiled.report.model["notes"] == ["its codes are kept (gguf, Q6_K, Q4_0, Q8_0)"]
    check(compiled, reference)
    compiled.save(tmp_path / "artifact")
    check(graphwright.load(tmp_path / "artifact"), reference)


def test_act_order_runs_with_one_gather_per_input(tmp_path):
    _, reference = checkpoint(tmp_path, act_order=True, depth=1, desc_act=True)
    compiled = graphwright.compile(str(tmp_path), "as-is")
    assert next(r for r in compiled.report.passes if r["name"] == "keep_codes")["notes"]["layers"] == {
        "int4 in groups of 32": 7
    }
    gathers = list(compiled.program.calls(torch.ops.aten.index_select.default))
    assert len(gathers) == 4, "q, k and v share one, and gate and up"
    check(compiled, reference)


def test_reading_in_floats_is_said_in_the_report(tmp_path):
    checkpoint(tmp_path, depth=1)
    source = open_model(tmp_path)
    assert source.notes[0].startswith("its weights are quantized already (gptq, 4 bits in groups of 32): they were ")
    program = capture(source.model)
    program = program.with_(metadata=source.described(program.metadata))
    facts = {"recipe": Recipe(), "target": Target.parse("cpu"), "backend": "", "coverage": {}, "seconds": {}}
    report = collect(program, program, peak_memory_bytes=0, **facts)
    with (console := Console(width=200)).capture() as printed:
        print_report(report, console)
    assert f"Checkpoint  {source.notes[0]}" in printed.get()


def test_the_dense_weight_of_a_layer_in_codes_is_never_made(tmp_path, monkeypatch):
    checkpoint(tmp_path, depth=1)
    monkeypatch.setattr(Packed, "dense", lambda _self: pytest.fail("dequantized"))
    program = capture(open_model(tmp_path, keep_codes=True).model)
    assert len(list(program.calls(quantized_linear.target))) == 7
    assert {t.dim() for n, t in program.weights().items() if t.is_floating_point() and "proj.weight" in n} <= {2}
    assert not any(n.endswith("proj.weight") for n in program.weights())


def test_a_model_in_floats_has_no_codes_to_keep(tiny_model_directory):
    with pytest.raises(PassError, match="holds no weights in codes"):
        graphwright.compile(str(tiny_model_directory), "as-is")


def test_rounding_beside_kept_codes_is_refused():
    recipe = Recipe.load({"passes": ["keep_codes", "rtn"]})
    with pytest.raises(RecipeError, match="excludes quantized"):
        plan_passes(recipe)


def test_the_tied_table_is_stored_once(tmp_path):
    write(tmp_path / "tiny.gguf", {"embed_tokens": "Q8_0"}, tied=True)
    program = capture(open_model(tmp_path / "tiny.gguf", tokenizer=tmp_path, keep_codes=True).model)
    (head,) = program.calls(quantized_linear.target)
    (table,) = program.calls(quantized_embedding.target)
    assert head.args[1].target == table.args[1].target


def test_packed_modules_equal_their_dense_weight():
    codes = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    packed = Packed(codes, torch.rand(6, 1), torch.randn(6, 1), "int4_offset", 32, 30, torch.randperm(30))
    x, bias = torch.randn(2, 3, 30), torch.randn(6)
    expected = x @ packed.dense().t() + bias
    assert relative_error(PackedLinear(packed, bias)(x), expected) < 1e-5
