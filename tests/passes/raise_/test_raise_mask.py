"""What masks mean, found by evaluation: families, hand-written masks, random structures."""

import pytest
import torch
from families import plain
from families.cache import captured
from families.configs import FAMILIES
from families.plain import capture_plain, capture_smallest, run_passes
from families.raised import ATTENTION, attention_text
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.evaluate import evaluate, index_domain
from graphwright.numerics import relative_error
from graphwright.ops import attention
from graphwright.passes.raise_._mask_structure import Case, Structure, classify
from graphwright.program import Program
from graphwright.text import op_name

LEFTOVERS = {
    "scaled_dot_product_attention", "softmax.int", "_softmax", "bmm", "baddbmm", "where.self", "where.Scalar",
    "masked_fill.Scalar", "le.Tensor", "lt.Tensor", "gt.Tensor", "ge.Scalar", "lt.Scalar", "logical_and", "logical_or",
    "logical_not", "new_ones", "tril", "triu", "expand", "broadcast_to", "repeat_interleave.self_int", "max.dim",
}  # fmt: skip
"""Ops of which attention, masks and repeated heads are made."""

ROUTER = {"softmax.int"}
ALLOWED = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "gpt_oss"), ROUTER),
    "deepseek_v3": {"logical_not", "masked_fill.Scalar", "expand"},  # the router hides groups of experts
    "falcon_grouped": {"expand"},  # copies of heads that lie before rope, until that is raised
    "t5": {"where.self", "lt.Scalar"},  # buckets of relative positions
    "bert": {"expand"},  # token types
}
"""What of it is something else, by family. DeepSeek's `expand` gives the shared rope key to every head."""


def texts(program: Program) -> tuple[str, ...]:
    return tuple(attention_text(node) for node in program.calls(attention.target))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_the_masks_that_their_configurations_say(name: str) -> None:
    _model, program = captured(name)
    program, results = run_passes(program)
    assert texts(program) == ATTENTION[name]
    assert results["raise_mask"].near_misses == []


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_the_mask_is_left(name: str) -> None:
    _model, program = captured(name)
    program, _results = run_passes(program)
    allowed = ALLOWED.get(name, set()) | ({"expand"} if name.startswith("deepseek") else set())
    assert {op_name(node.target) for node in program.calls()} & LEFTOVERS <= allowed
    positions = [node for node in program.calls() if op_name(node.target) == "where.ScalarOther"]
    assert len(positions) == 1


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_a_second_run_changes_nothing(name: str) -> None:
    _model, program = captured(name)
    program, _results = run_passes(program)
    again, results = run_passes(program.clone())
    assert not any(result.sites for result in results.values())
    assert again.text() == program.text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Causal", "causal"),
        ("NanoGpt", "causal"),
        ("WhereNumber", "causal"),
        ("Additive", "causal"),
        ("MergedHeads", "causal"),
        ("SingleHead", "causal"),
        ("SoftcapSinks", "causal, softcap 2.0, sinks"),
        ("Prefix", "causal, prefix 3"),
        ("Chunked", "causal, chunk 6"),
        ("LongWindow", "causal, window 40"),
        ("BothWays", "window 4"),
        ("Alibi", "causal, alibi"),
        ("RandomBiasAndMask", "causal, bias"),
    ],
)
def test_hand_written_masks(name: str, text: str) -> None:
    module = getattr(plain, name)()
    program, _results = run_passes(capture_plain(module))
    assert texts(program) == (text,)
    for batch, length in ((2, 9), (1, 1), (3, 60)):
        x = torch.randn(batch, length, plain.WIDTH)
        assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("TokenMask", "depends on more than sizes"),
        ("CausalAtFirst", "none of causal"),
        ("Dilated", "none of causal"),
        ("RandomBias", None),
        ("SymmetricDistance", None),
    ],
)
def test_what_is_no_known_mask_stays_a_bias(name: str, reason: str | None) -> None:
    module = getattr(plain, name)()
    program, results = run_passes(capture_plain(module))
    assert texts(program) == ("bias",)
    assert [reason in miss for miss in results["raise_mask"].near_misses] == ([True] if reason else [])
    for batch, length in ((2, 9), (1, 1), (3, 60)):
        x = torch.randn(batch, length, plain.WIDTH)
        assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


def test_a_window_longer_than_what_is_tried_is_not_taken_for_causal() -> None:
    class Distant(plain.Fused):
        def mask(self, queries, keys):
            return (keys <= queries) & (keys > queries - 10000)

    inputs, dims = {"x": torch.randn(2, 9, plain.WIDTH)}, {"x": {0: "batch", 1: "sequence"}}
    program = plain.capture(Distant(), inputs, dims=dims, metadata=plain.Metadata(context_length=1 << 17))
    program, results = run_passes(program)
    assert texts(program) == ("bias",)
    assert "more than is tried" in results["raise_mask"].near_misses[0]


@pytest.mark.slow
def test_a_window_of_released_models_shows() -> None:
    class Mistral(plain.Fused):
        def mask(self, queries, keys):
            return (keys <= queries) & (keys > queries - 4096)

    inputs, dims = {"x": torch.randn(2, 9, plain.WIDTH)}, {"x": {0: "batch", 1: "sequence"}}
    program = plain.capture(Mistral(), inputs, dims=dims, metadata=plain.Metadata(context_length=1 << 15))
    program, _results = run_passes(program)
    assert texts(program) == ("causal, window 4096",)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_padding_by_hand(side: str) -> None:
    module = plain.PaddedBothWays()
    program, _results = run_passes(capture_plain(module, mask=True))
    assert texts(program) == ("causal, padding",)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    mask = {"right": mask, "left": mask.flip(1), "holes": torch.tensor([[1, 0, 1, 0, 0, 1]] * 3)}[side]
    x, real = torch.randn(3, 6, plain.WIDTH), mask.bool()
    actual, expected = program(x=x, attention_mask=mask)[0], module(x, mask).detach()
    assert relative_error(actual[real], expected[real]) < 1e-5


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_alibi_counts_what_is_not_padding_even_with_holes(name: str) -> None:
    model, program = captured(name)
    program, _results = run_passes(program)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
    actual = program(input_ids=ids, attention_mask=mask)[0]
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-5


def test_alibi_slopes_are_those_of_the_model() -> None:
    _model, program = captured("bloom")
    program, _results = run_passes(program)
    slopes = next(tensor for name, tensor in program.weights().items() if name.startswith("alibi"))
    assert slopes.tolist() == [2**-2, 2**-4, 2**-6, 2**-8]


def test_positions_as_inputs_prove_nothing() -> None:
    _model, program = captured("llama")
    specs = tuple(spec.__class__(**{**vars(spec), "role": "position"}) for spec in program.contract.inputs[1:])
    program.contract = program.contract.with_(inputs=(program.contract.inputs[0], *specs))
    program, results = run_passes(program)
    assert texts(program) == ("bias", "bias")
    assert "depends on more than" in results["raise_mask"].near_misses[0]


def test_evaluate_answers_shape_questions_without_activations() -> None:
    program = capture_plain(plain.Prefix())
    mask = next(node for node in program.calls() if op_name(node.target) == "logical_or")
    assert mask in index_domain(program)
    (value,) = evaluate(program, [mask], batch=2, sequence=5)
    steps = torch.arange(5)
    assert torch.equal(value, (steps[None] <= steps[:, None]) | (steps[None] < 3))


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    causal = draw(st.booleans())
    return Structure(
        causal=causal,
        window=draw(st.sampled_from((0, 0, 2, 3, 5, 9))),
        chunk=draw(st.sampled_from((0, 0, 2, 3, 6))),
        prefix=draw(st.sampled_from((0, 0, 2, 3, 5))) if causal else 0,
        padding=draw(st.booleans()),
    )


def cases(structure: Structure, seed: int, lengths: tuple[int, ...] = (7, 20)) -> list[Case]:
    generator, made = torch.Generator().manual_seed(seed), []
    for length in lengths:
        for real in (torch.ones(2, length).bool(), torch.rand(3, length, generator=generator) < 0.7):
            allowed = structure.allowed(length, length).expand(len(real), -1, -1)
            made.append(Case(allowed & real[:, None] if structure.padding else allowed, real, real))
    return made


@given(structures(), st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_classify_gives_back_what_a_mask_was_made_of(structure: Structure, seed: int) -> None:
    found = classify(cases(structure, seed))
    assert found is not None
    assert found.padding == structure.padding
    assert torch.equal(found.allowed(50, 50), structure.allowed(50, 50))


@given(structures(), st.integers(0, 100), st.integers(0, 19), st.integers(0, 19))
@settings(max_examples=100, deadline=None)
def test_one_wrong_entry_is_never_overlooked(structure: Structure, seed: int, query: int, key: int) -> None:
    made = cases(structure, seed)
    wrong = made[2].allowed.clone()
    wrong[:, query, key] ^= True
    found = classify([*made[:2], Case(wrong, made[2].keys, made[2].queries), *made[3:]])
    assert found is None or torch.equal(found.allowed(20, 20), wrong[0])


def test_golden_text() -> None:
    program, _results = run_passes(capture_smallest())
    assert (
        program.text()
        == """\
%q : float32[batch, 4, sequence, 4]
%k : float32[batch, 2, sequence, 4]
%v : float32[batch, 2, sequence, 4]
%attention_mask : int64[batch, sequence]
%4 = ne.Scalar(%attention_mask, 0) : bool[batch, sequence]
%5 = sym_size.int(%attention_mask, 1) : sequence
%6 = arange(%5, device=cpu, pin_memory=False) : int64[sequence]
%7 = unsqueeze(%6, 0) : int64[1, sequence]
%8 = where.ScalarOther(%4, %7, -1) : int64[batch, sequence]
%9 = attention(%q, %k, %v, None, %8, None, None, None, scale=0.5, causal=True) : float32[batch, 4, sequence, 4]
return [%9]
"""
    )
