"""GPTQ: identity Hessian gives RTN, correlated inputs give less error, odd widths, dead and singular Hessians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import correlated, hessian, run

from graphwright import rounding
from graphwright.calibration import Hessian
from graphwright.errors import PassError
from graphwright.passes.quantize.gptq import Gptq
from graphwright.scheme import Scheme
from graphwright.second_order import inverse_factor


def solve(weight: torch.Tensor, statistics: Hessian, **options) -> rounding.Quantized:
    one = Gptq(**options)
    return one.solve(weight, one.scheme(), statistics)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([0, 8, 32, 64, 96]),
    width=st.integers(9, 150),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_independent_inputs_give_round_to_nearest(bits, group, width, symmetric, act_order):
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(width))
    options = {"bits": bits, "group_size": group, "symmetric": symmetric, "act_order": act_order}
    done = solve(weight, Hessian(torch.eye(width), 1), block_size=32, **options)
    nearest = rounding.quantize(weight, Gptq(**options).scheme())
    assert torch.equal(done.packed, nearest.packed)
    assert torch.equal(done.grid.scale, nearest.grid.scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 0), (4, 48), (4, 160)])
def test_correlated_inputs_give_less_error_than_round_to_nearest(bits, group, act_order):
    torch.manual_seed(1)
    weight, statistics = torch.randn(40, 144), hessian(correlated(600, 144))
    done = solve(weight, statistics, bits=bits, group_size=group, act_order=act_order)
    nearest = rounding.quantize(weight, done.scheme)
    errors = [rounding.output_error(weight, q.dense(), statistics.matrix) for q in (done, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_blocks_do_not_change_the_result(block_size):
    torch.manual_seed(2)
    weight, statistics = torch.randn(5, 100), hessian(correlated(300, 100))
    whole, parts = (solve(weight, statistics, group_size=20, bits=4, block_size=b) for b in (100, block_size))
    # Sums of another order may turn a code at the middle between two.
    assert (whole.dense() - parts.dense()).abs().gt(1e-6).float().mean() < 0.02


def test_each_step_solves_the_least_squares_problem():
    torch.manual_seed(3)
    weight, x = torch.randn(1, 6), correlated(50, 6)
    statistics = hessian(x)
    done = solve(weight, statistics, bits=2, group_size=0, act_order=False, damping=1e-9)
    target = x.double() @ weight.double().T
    free, grid = weight.clone().double(), rounding.grid(rounding.grouped(weight, done.scheme), done.scheme)
    for column in range(6):
        value = grid.values(grid.codes(free[:, None, column : column + 1].float(), "int2"), "int2")[:, 0]
        free[:, column] = value[:, 0].double()
        rest = x.double()[:, column + 1 :]
        if rest.shape[1]:
            residual = target - x.double()[:, : column + 1] @ free[:, : column + 1].T
            free[:, column + 1 :] = torch.linalg.lstsq(rest, residual).solution.T
    assert torch.allclose(done.dense().double(), free, atol=1e-5)


def test_dead_channels_do_not_widen_the_range():
    weight, x = torch.randn(8, 32), correlated(200, 32)
    x[:, 5], weight[:, 5] = 0, 1000.0
    statistics = hessian(x)
    done = solve(weight, statistics, group_size=32)
    assert rounding.output_error(weight, done.dense(), statistics.matrix) < 0.2


def test_fewer_samples_than_channels_still_work():
    weight, statistics = torch.randn(8, 64), hessian(correlated(5, 64))
    assert solve(weight, statistics).dense().isfinite().all()


def test_a_hessian_that_cannot_be_damped_is_refused():
    with pytest.raises(PassError, match="not positive definite"):
        inverse_factor(-torch.eye(4) * 1e9 + torch.diag(torch.tensor([4e9 + 1.0, 0, 0, 0])), 1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "t5"])
def test_every_layer_of_different_families_is_solved(name):
    options = {"bits": 3, "group_size": 32, "head_bits": 0, "embedding_bits": 0}
    if name == "t5":
        with pytest.warns(match="random tokens"):
            _, after = run([{"gptq": options}], name, calibration=[])
    else:
        _, after = run([{"gptq": options}], name)
    record = after.history[-1]
    assert record.sites == len(record.notes["layer_errors"]) > 4
    assert all(0 < error < 0.5 for error in record.notes["layer_errors"].values())


def test_options_that_make_no_scheme_are_refused_at_once():
    with pytest.raises(ValueError, match="multiple of 8"):
        Gptq(bits=3, group_size=12)
    assert Scheme(format="int3", group_size=0).group(13) == 16
