"""What all weight quantizers share: selection and schemes of layers, mixed precision, float formats, HQQ."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import run
from report.made import report

from graphwright import rounding
from graphwright.allocation import Option, frontier, reaching, within
from graphwright.errors import PassError
from graphwright.ops import quantized_linear
from graphwright.passes.quantize.hqq import Hqq
from graphwright.passes.quantize.rtn import Rtn
from graphwright.report.frontier import frontier_charts
from graphwright.report.html import render
from graphwright.scheme import Scheme

aten = torch.ops.aten
SMALL = {"group_size": 32, "head_bits": 0, "embedding_bits": 0}


def formats(program) -> dict[str, str]:
    return {str(n.args[1]).rpartition("_")[0]: str(n.args[5]) for n in program.calls(quantized_linear.target)}


def test_patterns_choose_schemes_and_keep_layers():
    layers = {"down_proj": {"format": "int8", "group_size": 0}, r"layers\.0\..*q_proj": {"keep": True}}
    _, after = run([{"rtn": {**SMALL, "layers": layers}}])
    found = formats(after)
    assert {name: f for name, f in found.items() if f == "int8"}.keys() == {n for n in found if "down_proj" in n}
    kept = [str(n.args[1].target) for n in after.calls(aten.linear.default)]
    assert kept == ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]


def test_a_pattern_may_name_the_head():
    _, after = run([{"rtn": {**SMALL, "layers": {"lm_head": {"format": "int4"}}}}])
    assert not list(after.calls(aten.linear.default))


def test_first_and_last_layers_may_be_kept():
    _, after = run([{"rtn": {**SMALL, "keep_first": 2, "keep_last": 1}}])
    kept = [str(n.args[1].target) for n in after.calls(aten.linear.default)]
    assert [name.split(".")[-2] for name in kept] == ["q_proj", "k_proj", "down_proj", "lm_head"]


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(PassError, match=r"No layer's weight matches querry.*Weights are called"):
        run([{"rtn": {"layers": {"querry": {"keep": True}}}}])


@pytest.mark.parametrize("passes", [["nf4"], ["mxfp4"], ["fp8"], [{"fp8": {"format": "fp8_e5m2", "group_size": -1}}]])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_floating_point_formats_run(passes, name):
    _, after = run(passes, name)
    errors = after.history[-1].notes["layer_errors"]
    assert len(errors) > 8
    assert max(errors.values()) < 0.2


def test_microscaling_scales_are_powers_of_two_that_clip_nothing():
    weight = torch.randn(16, 96) * torch.logspace(-3, 3, 16)[:, None]
    done = rounding.quantize(weight, Scheme(format="mxfp4", group_size=32, symmetric=True, scale_dtype="float32"))
    assert torch.equal(done.grid.scale.log2(), done.grid.scale.log2().round())
    assert (weight.unflatten(1, (-1, 32)).abs().amax(-1) <= 6 * done.grid.scale).all()


def test_a_scale_of_the_whole_tensor_is_one_number():
    scheme = Scheme(format="fp8_e4m3", group_size=-1, symmetric=True, scale_dtype="float32")
    done = rounding.quantize(torch.randn(5, 40), scheme)
    assert len(done.grid.scale.unique()) == 1
    assert done.dense().abs().max() > 1


@given(bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([0, 16, 64]), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_hqq_never_has_a_larger_mean_error_than_where_it_starts(bits, group, seed):
    weight = torch.randn(8, 72, generator=torch.Generator().manual_seed(seed)) ** 3
    one = Hqq(bits=bits, group_size=group)
    found, start = one.solve(weight, one.scheme(), None), rounding.quantize(weight, one.scheme())
    assert (found.dense() - weight).abs().mean() <= (start.dense() - weight).abs().mean() + 1e-6
    assert found.grid.zero_point.dtype == torch.float16


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=3), min_size=1, max_size=5
    )
)
@settings(deadline=None)
def test_the_frontier_is_exact(layers):
    options = [[Option(b, float(loss)) for b, loss in layer] for layer in layers]
    points = frontier(options)
    every = [(sum(o.bytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*options)]
    best = {(b, loss) for b, loss in every if not any(x <= b and y <= loss and (x, y) != (b, loss) for x, y in every)}
    assert {(p.bytes, p.loss) for p in points} == best
    for point in points:
        chosen = [layer[index] for layer, index in zip(options, point.chosen, strict=True)]
        assert (sum(o.bytes for o in chosen), sum(o.loss for o in chosen)) == (point.bytes, point.loss)
        assert within(points, point.bytes) is point
        assert reaching(points, point.loss) is point


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(PassError, match="take at least 3"):
        within(frontier([[Option(3, 0.0)]]), 2)
    with pytest.raises(PassError, match="layers take at least"):
        run([{"rtn": {**SMALL, "mixed_bits": 2.1}}])
    with pytest.raises(PassError, match="lose at least 1"):
        reaching(frontier([[Option(3, 1.0)]]), 0.5)
    with pytest.raises(PassError, match="the layers lose at least"):
        run([{"rtn": {**SMALL, "mixed_error": 1e-6}}])
    with pytest.raises(ValueError, match="two budgets"):
        Rtn(mixed_bits=4.0, mixed_error=0.1)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_mixed_precision_spends_its_budget_where_it_helps(method):
    _, uniform = run([{"rtn": {**SMALL, "bits": 3}}])
    _, mixed = run([{method: {**SMALL, "mixed_bits": 4.25}}])
    record = mixed.history[-1]
    assert len(set(record.notes["bits"].values())) > 1
    assert set(formats(mixed).values()) <= {"int2", "int3", "int4", "int8"}
    bits, losses = zip(*record.notes["frontier"], strict=True)
    assert sorted(bits) == list(bits)
    assert sorted(losses, reverse=True) == list(losses)
    codes = sum(t.nbytes for name, t in mixed.weights().items() if "proj" in name)
    weights = sum(t.numel() for name, t in uniform.weights().items() if name.endswith("int3")) * 8 / 3
    assert codes * 8 / weights <= 4.25
    assert sum(record.notes["layer_errors"].values()) < sum(uniform.history[-1].notes["layer_errors"].values())


def test_an_error_budget_is_met_with_as_few_bits_as_can_be():
    found = {}
    for limit in (0.05, 0.15):
        _, mixed = run([{"rtn": {**SMALL, "mixed_error": limit}}])
        notes = mixed.history[-1].notes
        bits, loss = notes["chosen"]
        assert loss**0.5 <= limit
        cheaper = [error for b, error in notes["frontier"] if b < bits - 1e-9]
        assert all(error**0.5 > limit for error in cheaper)
        found[limit] = bits
    assert found[0.15] < found[0.05]


def test_the_report_draws_the_frontier_and_says_what_was_chosen():
    before, mixed = run([{"rtn": {**SMALL, "mixed_bits": 4.25}}])
    made = report(before, mixed)
    (chart,) = frontier_charts(made)
    points = [tuple(map(float, point.split(","))) for point in chart.path[1:].split("L")]
    assert len(points) == len(mixed.history[-1].notes["frontier"]) > 5
    # More bits lie to the right, less error below.
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    # The figure chosen lies on the line, between the points before and after it.
    left, right = max(p for p in points if p[0] <= chart.x), min(p for p in points if p[0] >= chart.x)
    assert left[1] <= chart.y <= right[1]
    page = render(made)
    assert chart.path in page
    assert chart.text in page
    assert "4.2" in chart.text
    bits, _ = mixed.history[-1].notes["chosen"]
    assert f"{bits:.2f} bits per weight" in chart.text
