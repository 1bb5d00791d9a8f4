"""Low rank: errors are the closed forms, SVD-LLM is the optimum, budgets are met, factors quantize, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import correlated, run

from graphwright import rounding
from graphwright.calibration import Hessian
from graphwright.errors import PassError, RecipeError
from graphwright.factorizer import allocate, factors
from graphwright.ops import quantized_linear
from graphwright.passes.low_rank.asvd import Asvd, Magnitudes
from graphwright.passes.low_rank.loftq import LoftQ
from graphwright.passes.low_rank.svd import Svd
from graphwright.passes.low_rank.svd_llm import SvdLlm
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.rounding import output_error
from graphwright.structure import head, linears


def magnitudes(x: torch.Tensor) -> Magnitudes:
    """The collector, filled with x; X^T X of a square root of the identity is the identity."""
    collected = Magnitudes()
    collected.add(x)
    return collected


def layer(rows: int = 40, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    spread = 2.0 ** torch.randint(-3, 4, (width,), generator=generator)
    return torch.randn(rows, width, generator=generator), correlated(500, width) * spread


@pytest.mark.parametrize(("rows", "width", "rank"), [(40, 96, 8), (96, 40, 25), (33, 33, 1), (7, 50, 7)])
def test_plain_svd_loses_the_truncated_singular_values(rows, width, rank):
    weight, _ = layer(rows, width)
    found = factors(weight, Svd().scaling(None, width), rank)
    lost = torch.linalg.svdvals(weight.double())[rank:].square().sum()
    assert found.left.shape == (rows, rank)
    assert found.right.shape == (rank, width)
    assert float((found.dense() - weight).double().square().sum()) == pytest.approx(float(lost), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("rows", "width", "rank"), [(40, 96, 8), (96, 40, 25), (33, 80, 1)])
def test_svd_llm_loses_exactly_what_it_truncates_of_the_output(rows, width, rank):
    weight, x = layer(rows, width)
    method, statistics = SvdLlm(damping=1e-9), magnitudes(x)
    scaling = method.scaling(statistics, width)
    lost = torch.linalg.svdvals(scaling.times(weight.double()))[rank:].square().sum()
    difference = factors(weight, scaling, rank).dense() - weight
    assert float((x.double() @ difference.double().T).square().sum()) == pytest.approx(float(lost), rel=1e-3)


@given(rank=st.integers(1, 39), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=15)
def test_svd_llm_is_never_worse_than_the_others(rank, seed):
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(seed))
    statistics = magnitudes(correlated(300, 48, seed) * torch.linspace(0.1, 8, 48))
    errors = [
        output_error(weight, factors(weight, one.scaling(statistics, 48), rank).dense(), statistics.matrix)
        for one in (SvdLlm(damping=1e-9), Asvd(), Svd())
    ]
    assert errors[0] <= min(errors[1:]) * 1.001


def test_asvd_beats_svd_where_channels_have_outliers_and_is_svd_without_power():
    weight, x = layer()
    x = torch.randn(500, 96)
    x[:, :4] *= 50
    statistics = magnitudes(x)
    dense = {
        name: factors(weight, one.scaling(statistics, 96), 16).dense()
        for name, one in {"svd": Svd(), "asvd": Asvd(), "none": Asvd(alpha=0)}.items()
    }
    assert torch.allclose(dense["none"], dense["svd"], atol=1e-4)
    assert output_error(weight, dense["asvd"], statistics.matrix) < 0.8 * output_error(
        weight, dense["svd"], statistics.matrix
    )


@pytest.mark.parametrize("method", [Svd, Asvd, SvdLlm])
def test_full_rank_loses_nothing_and_independent_inputs_give_the_plain_svd(method):
    weight, _ = layer()
    identity = magnitudes(torch.eye(96))
    assert torch.allclose(factors(weight, method().scaling(identity, 96), 40).dense(), weight, atol=1e-4)
    plain = factors(weight, Svd().scaling(None, 96), 10).dense()
    assert torch.allclose(factors(weight, method().scaling(identity, 96), 10).dense(), plain, atol=1e-4)


@given(ratio=st.floats(0.05, 0.8), seed=st.integers(0, 99), multiple=st.sampled_from([1, 4, 8]))
@settings(deadline=None, max_examples=40)
def test_a_budget_is_met_and_spent(ratio, seed, multiple):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"w{i}": (64 * (i + 1), 96) for i in range(4)}
    spectra = {n: torch.rand(min(s), generator=generator).sort(descending=True).values for n, s in shapes.items()}
    ranks = allocate(shapes, spectra, ratio, multiple)
    whole = sum(rows * width for rows, width in shapes.values())
    used = sum(min(r * sum(shapes[n]), shapes[n][0] * shapes[n][1]) for n, r in ranks.items())
    largest_step = multiple * max(sum(s) for s in shapes.values()) + max(96 * sum(s) // 9 for s in shapes.values())
    assert used <= (1 - ratio) * whole
    assert used >= (1 - ratio) * whole - largest_step


def test_ranks_go_where_singular_values_are():
    flat, steep = torch.full((64,), 1 / 64), torch.zeros(64)
    steep[0] = 1.0
    ranks = allocate({"flat": (64, 64), "steep": (64, 64)}, {"flat": flat, "steep": steep}, 0.6, 1)
    assert ranks["steep"] < 3
    assert ranks["flat"] > 20


def parameters(program: Program) -> int:
    return sum(program.weight(weight).numel() for node, weight in linears(program) if node is not head(program))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm"])
def test_layers_of_families_become_two_and_the_ratio_is_met(name, method):
    options = {"ratio": 0.3, "multiple": 1}
    before, after = run(["merge_linear", {method: options}, "static_cache"], name)
    record = next(r for r in after.history if r.name == method)
    merged = run(["merge_linear"], name, program=before)[1]
    assert len(linears(after)) == 2 * (len(linears(merged)) - 1) + 1
    assert 1 - parameters(after) / parameters(merged) == pytest.approx(record.notes["removed"])
    assert 0.3 <= record.notes["removed"] < 0.36


def test_ranks_per_layer_under_a_budget():
    _, after = run(["merge_linear", {"svd_llm": {"ratio": 0.4, "allocation": "global", "multiple": 2}}])
    record = after.history[-1]
    assert 0.4 <= record.notes["removed"] < 0.5
    assert len(set(record.notes["ranks"].values())) > 2


def test_factors_are_quantized_saved_and_loaded(tmp_path):
    _, after = run(["merge_linear", {"svd_llm": {"ratio": 0.3}}, {"rtn": {"bits": 8, "group_size": 0}}, "static_cache"])
    assert not [n for n, _ in linears(after)]
    assert len(list(after.calls(quantized_linear.target))) > 8
    after.save(tmp_path)
    loaded = Program.load(tmp_path)
    inputs = after.contract.draw({"batch": 2, "sequence": 5}, seed=0)
    state = [after.contract.allocate(after.contract.sizes({"batch": 2, "sequence": 5})) for _ in range(2)]
    assert torch.equal(after(**inputs, **state[0])[0], loaded(**inputs, **state[1])[0])


def test_illegal_orders_and_bad_input_are_refused():
    _, pruned = run(["magnitude"])
    with pytest.raises(PassError, match="svd would undo magnitude.*sparse already"):
        run(["svd"], program=pruned)
    with pytest.raises(RecipeError, match="lists magnitude before svd, which must come first"):
        run(["magnitude", "svd"])
    _, both = run(["svd", "magnitude"])
    assert [r.name for r in both.history][-2:] == ["svd", "magnitude"]
    with pytest.raises(RecipeError, match="ratio is 1"):
        Recipe.load({"passes": [{"svd": {"ratio": 1}}]})
    with pytest.raises(PassError, match="leaves no rank.*largest ratio for it"):
        run([{"svd": {"ratio": 0.95}}])
    with pytest.raises(PassError, match="leaves"):
        run([{"svd": {"ratio": 0.95, "allocation": "global", "multiple": 16}}])
    with pytest.raises(PassError, match="singular"):
        SvdLlm(damping=1e-12).scaling(Hessian(torch.zeros(4, 4), 1), 4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(40, 96), (96, 33)])
def test_compensation_is_the_svd_of_what_rounding_lost_and_turns_help(bits, shape):
    weight = layer(*shape)[0]
    plain = LoftQ(bits=bits, group_size=32, rank=8, turns=1)
    scheme = plain.scheme()
    rounded = rounding.quantize(weight, scheme)
    assert torch.equal(plain.solve(weight, scheme, None).packed, rounded.packed)
    lost = torch.linalg.svdvals((weight - rounded.dense()).double())[8:].square().sum().sqrt()
    error = plain.error(weight, rounded, None)
    assert error == pytest.approx(float(lost / weight.norm()), rel=1e-4)
    assert error < rounding.relative_weight_error(weight, rounded)
    turned = LoftQ(bits=bits, group_size=32, rank=8, turns=5)
    assert turned.error(weight, turned.solve(weight, scheme, None), None) <= error * (1 + 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compensated_layers_run_with_caches_and_err_less(name):
    options = {"bits": 2, "group_size": 32}
    _, rounded = run(["merge_linear", {"rtn": options}, "static_cache"], name)
    _, after = run(["merge_linear", {"loftq": {**options, "rank": 8}}, "static_cache"], name)
    kl = [next(r for r in p.history if r.name in ("rtn", "loftq")).notes["kl"] for p in (after, rounded)]
    assert kl[0] < kl[1]
    inner = len(list(after.calls(quantized_linear.target))) - 1
    assert len(linears(after)) == 2 * inner


def test_factors_of_a_compensation_may_be_rounded(tmp_path):
    options = {"bits": 2, "group_size": 32, "rank": 8}
    weight = layer(40, 96)[0]
    plain, narrow = LoftQ(**options), LoftQ(**options, factor_bits=8)
    done = narrow.solve(weight, narrow.scheme(), None)
    assert narrow.error(weight, done, None) == pytest.approx(plain.error(weight, done, None), rel=0.02)
    _, wide = run(["merge_linear", {"loftq": options}])
    _, after = run(["merge_linear", {"loftq": {**options, "factor_bits": 8}}, "static_cache"])
    assert not linears(after)
    assert sum(t.nbytes for t in after.weights().values()) < 0.8 * sum(t.nbytes for t in wide.weights().values())
    after.save(tmp_path)
    assert Program.load(tmp_path).text(shapes=False) == after.text(shapes=False)


def test_a_rank_that_is_no_rank_is_refused():
    with pytest.raises(PassError, match="nearest rank that is legal is 63"):
        run([{"loftq": {"rank": 64}}])
    with pytest.raises(RecipeError, match="excludes sparse"):
        run(["wanda", "loftq"])
