"""Attention found in families and hand-written modules, with the same numbers."""

import copy

import pytest
import torch
from families import plain
from families.cache import captured
from families.configs import FAMILIES, example_inputs
from families.plain import Plain, capture_plain, capture_smallest, run_passes
from families.raised import ATTENTION

from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import attention
from graphwright.program import Program
from graphwright.text import op_name

SHAPES = (
    {"batch": 2, "length": 7},
    {"batch": 1, "length": 1},
    {"batch": 1, "length": 13},
    {"batch": 4, "length": 9, "padding": "right"},
    {"batch": 4, "length": 9, "padding": "left"},
)

PLAIN_ROUTED = {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"}
"""Families whose grouped matmul has no float64, and their noise in float32."""


def noise(name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], real: torch.Tensor) -> float:
    """How far the model itself is from float64, and at least 1e-5."""
    if name in PLAIN_ROUTED:
        return 3e-5
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs)[0].float()
        return max(1e-5, relative_error(model(**inputs)[0][real], exact[real]))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_numbers_through_all_attention_passes(name: str) -> None:
    model, program = captured(name)
    program, _results = run_passes(program)
    for shape in SHAPES:
        inputs = example_inputs(name, **shape)
        (actual, *_), mask = program(**inputs), inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**inputs)[0]
        real = mask if actual.shape[:2] == mask.shape else torch.ones(actual.shape[:2], dtype=torch.bool)
        assert relative_error(actual[real], expected[real]) <= noise(name, model, inputs, real), shape


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_of_a_family_is_raised(name: str) -> None:
    _model, program = captured(name)
    program, results = run_passes(program, ("raise_attention",))
    assert len(list(program.calls(attention.target))) == len(ATTENTION[name])
    assert results["raise_attention"].near_misses == []
    again, results = run_passes(program.clone(), ("raise_attention",))
    assert results["raise_attention"].sites == []
    assert again.text() == program.text()


RAISED_MODULES = (
    "Causal",
    "EnableGqa",
    "NanoGpt",
    "WhereNumber",
    "Additive",
    "MergedHeads",
    "SingleHead",
    "SoftcapSinks",
    "Prefix",
    "Alibi",
    "RandomBias",
    "RandomBiasAndMask",
    "TokenMask",
    "SymmetricDistance",
    "MultiQuery",
)


def same_numbers(module: Plain, program: Program, lengths: tuple[int, ...] = (9, 1, 40)) -> None:
    for batch, length in enumerate(lengths, start=1):
        x = torch.randn(batch, length, plain.WIDTH, generator=torch.Generator().manual_seed(length))
        assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


@pytest.mark.parametrize("name", RAISED_MODULES)
def test_hand_written_attention_is_raised(name: str) -> None:
    module = getattr(plain, name)()
    program, results = run_passes(capture_plain(module), ("raise_attention",))
    assert len(list(program.calls(attention.target))) == 1, results["raise_attention"].near_misses
    assert not {"softmax.int", "bmm", "scaled_dot_product_attention"} & {op_name(n.target) for n in program.calls()}
    same_numbers(module, program)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("OtherDimension", "another dimension"),
        ("ActiveDropout", "dropout is active"),
        ("ActiveFusedDropout", "dropout is active"),
        ("WeightsReturned", "used elsewhere"),
        ("MaskedByZero", "does not mask"),
        ("MaskBeforeSoftcap", "soft cap includes"),
    ],
)
def test_what_only_looks_like_attention_stays(name: str, reason: str) -> None:
    program = capture_plain(getattr(plain, name)())
    before = program.text()
    program, results = run_passes(program, ("raise_attention",))
    assert program.text() == before
    (miss,) = results["raise_attention"].near_misses
    assert reason in miss


def test_float64_stays_because_the_op_computes_in_float32() -> None:
    module = plain.NanoGpt().double()
    x = torch.randn(2, 9, plain.WIDTH, dtype=torch.float64)
    program = plain.capture(module, {"x": x}, dims={"x": {0: "batch"}})
    _program, results = run_passes(program, ("raise_attention",))
    assert "float64" in results["raise_attention"].near_misses[0]


def test_scales_on_query_and_key_are_absorbed() -> None:
    class Scaled(Plain):
        def attend(self, q, k, v, x):
            q, k = (self.q(x) * 0.5).view(*x.shape[:2], -1, 8).transpose(1, 2), k / 4.0
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=3.0)

    module = Scaled()
    program, _results = run_passes(capture_plain(module), ("raise_attention",))
    (node,) = program.calls(attention.target)
    assert argument(node, "scale") == pytest.approx(3.0 * 0.5 / 4)
    assert not {"mul.Tensor", "div.Tensor"} & {op_name(n.target) for n in program.calls()}
    same_numbers(module, program)


def test_a_scale_that_something_else_reads_stays() -> None:
    class Shared(Plain):
        def attend(self, q, k, v, x):
            q = q * 0.5
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0) + q

    module = Shared()
    program, _results = run_passes(capture_plain(module), ("raise_attention",))
    (node,) = program.calls(attention.target)
    assert argument(node, "scale") == 1.0
    same_numbers(module, program)


def test_a_query_that_sees_no_key_yields_zeros_as_in_the_fused_call() -> None:
    class Blind(Plain):
        def attend(self, q, k, v, x):
            seen = (torch.arange(x.shape[1]) % 3 > 0)[:, None] & (x[:, None, None, :, 0] < 100)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)

    module = Blind()
    program, _results = run_passes(capture_plain(module), ("raise_attention",))
    x = torch.randn(2, 7, plain.WIDTH)
    assert not program(x=x)[0][:, ::3].any()
    assert relative_error(program(x=x)[0], module(x).detach()) < 1e-5


def test_fuel_stops_raising() -> None:
    _model, program = captured("llama")
    context = plain.context()
    context.fuel.limit = 1
    result = plain.registry.pass_class("raise_attention")().run(program, context)
    assert len(result.sites) == 1


def test_golden_text() -> None:
    program = capture_smallest()
    assert program.text(shapes=False).endswith(
        """\
%20 = transpose.int(%8, -1, -2)
%21 = matmul(%q, %20)
%22 = mul.Tensor(%21, 0.5)
%23 = masked_fill.Scalar(%22, %19, -inf)
%24 = softmax.int(%23, -1)
%25 = matmul(%24, %11)
return [%25]
"""
    )
    program, _results = run_passes(program, ("raise_attention",))
    assert program.text(shapes=False).endswith(
        """\
%20 = where.Scalar(%19, -inf, 0.0)
%21 = attention(%q, %8, %11, None, None, %20, None, None, scale=0.5, causal=False)
return [%21]
"""
    )
