"""SpQR: bits and layout, outliers, equal or less error than GPTQ at equal bytes, bad input, the op and its backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import batches, correlated, hessian, run

from graphwright import packing, rounding
from graphwright.backend import coverage
from graphwright.calibration import Hessian
from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.feeding import logits_of
from graphwright.numerics import relative_error
from graphwright.ops import spqr_linear
from graphwright.ops.spqr_linear import merged, sparse_product
from graphwright.pass_ import Context
from graphwright.passes.quantize.gptq import Gptq
from graphwright.passes.quantize.spqr import Spqr, TwoLevels, ranges_without_outliers
from graphwright.program import Program
from graphwright.registry import backend
from graphwright.target import Target

CPU = Target.parse("cpu")
NONE = 1e9


def heavy_tailed(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, width, generator=generator)
    return torch.where(torch.rand(rows, width, generator=generator) < 0.01, weight * 8, weight)


def solve(weight: torch.Tensor, statistics: Hessian, **options):
    one = Spqr(**options)
    return one.solve(weight, one.scheme(), statistics)


def error(weight, done, statistics) -> float:
    return rounding.output_error(weight, done.dense(), statistics.matrix)


@pytest.mark.parametrize("threshold", [NONE, 1.0, 0.2])
def test_bits_follow_the_formula(threshold):
    weight, statistics = heavy_tailed(320, 512), hessian(correlated(1000, 512))
    done = solve(weight, statistics, threshold=threshold)
    outliers = len(done.values) / weight.numel()
    expected = 3 + (3 + 3) / 16 + 64 / (16 * 16) + 32 * outliers + 32 / 512
    assert done.bits == pytest.approx(expected, rel=0.02)
    assert (outliers == 0) == (threshold == NONE)


@pytest.mark.parametrize("act_order", [False, True])
def test_at_equal_bytes_it_beats_gptq_on_heavy_tails(act_order):
    weight, statistics = heavy_tailed(160, 256), hessian(correlated(1000, 256))
    done = solve(weight, statistics, threshold=1.0, act_order=act_order)
    other = Gptq(bits=3, group_size=16, act_order=act_order)
    rival = other.solve(weight, other.scheme(), statistics)
    assert done.bits < other.scheme().bytes(*weight.shape) * 8 / weight.numel()
    assert error(weight, done, statistics) < 0.75 * error(weight, rival, statistics)


def test_more_outliers_are_less_error_and_more_bits():
    weight, statistics = heavy_tailed(64, 128), hessian(correlated(600, 128))
    found = [solve(weight, statistics, threshold=threshold) for threshold in (NONE, 1.0, 0.3, 0.05)]
    errors, bits = [error(weight, f, statistics) for f in found], [f.bits for f in found]
    assert errors == sorted(errors, reverse=True)
    assert bits == sorted(bits)


@given(
    rows=st.integers(1, 40), width=st.integers(1, 70), bits=st.sampled_from([2, 3, 4]), second=st.sampled_from([3, 8])
)
@settings(deadline=None, max_examples=25)
def test_any_shape_is_stored_and_restored(rows, width, bits, second):
    weight = heavy_tailed(rows, width)
    one = Spqr(bits=bits, statistic_bits=second)
    done = one.solve(weight, one.scheme(), hessian(correlated(90, width)))
    assert done.dense().shape == weight.shape
    assert done.dense().isfinite().all()
    assert done.starts.tolist()[-1] == len(done.values)
    again = one.restore(done.tensors(), one.scheme(), width)
    assert torch.equal(again.dense(), done.dense())


def test_groups_of_equal_weights_are_exact():
    weight = torch.tensor([[0.5] * 32, [0.0] * 32, [-2.0] * 32])
    done = solve(weight, Hessian(torch.eye(32), 1), statistic_bits=8, threshold=NONE)
    assert relative_error(done.dense(), weight) < 0.02
    assert (done.dense()[1].abs() < 0.02).all()


def test_one_outlier_of_a_group_is_left_out_of_its_range():
    weight = torch.linspace(-1, 1, 16).repeat(2, 1)
    weight[0, 5] = 50.0
    # Without the 50 the error falls by 22; without the -1 beside it, by 4, for the range becomes a little smaller.
    low, high = ranges_without_outliers(weight[:, None], torch.ones(1, 16), Spqr().scheme(), 10.0)
    assert low.flatten().tolist() == [-1.0, -1.0]
    assert high.flatten().tolist() == [1.0, 1.0]


def test_the_second_level_is_exact_where_its_steps_are_met():
    low, high = -torch.arange(1.0, 9.0).repeat(3, 2), torch.arange(1.0, 9.0).repeat(3, 2)
    levels = TwoLevels.of(low, high, Spqr().scheme(), "int3", 16)
    grid = levels.grid()
    assert torch.allclose(grid.scale, ((high - low) / 7).t(), rtol=2e-3)
    assert torch.allclose(grid.zero_point, torch.full((16, 3), 3.5), atol=0.01)


@pytest.mark.parametrize("rows", [(1,), (2, 4), (3, 7)])
def test_dense_and_sparse_equals_the_merged_weight(rows):
    weight, statistics = heavy_tailed(37, 90), hessian(correlated(300, 90))
    done = solve(weight, statistics)
    x, bias = torch.randn(*rows, 90), torch.randn(37)
    stored = done.tensors()
    actual = spqr_linear(x, *stored.values(), bias, *done.layout)
    assert relative_error(actual, x @ done.dense().T + bias) < 1e-5
    sparse = merged(torch.zeros(37, 90), done.values, done.columns, done.starts)
    assert relative_error(sparse_product(x, done.values, done.columns, done.starts), x @ sparse.T) < 1e-5
    assert int((sparse != 0).sum()) == len(done.values) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_rewritten_saved_and_loaded(name, tmp_path):
    _, after = run([{"spqr": {"head_bits": 0, "embedding_bits": 0}}], name)
    record = after.history[-1]
    assert record.sites == len(list(after.calls(spqr_linear.target))) == len(record.notes["layer_errors"])
    assert 3.6 < record.notes["bits_per_weight"] < 8
    assert 0 < record.notes["outliers"] < 0.2
    assert max(record.notes["layer_errors"].values()) < 0.3
    after.save(tmp_path)
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(logits_of(Program.load(tmp_path), ids), logits_of(after, ids))


def test_it_is_behind_gptq_nowhere_and_resumes(tmp_path):
    options = {"spqr": {"head_bits": 0, "embedding_bits": 0}}
    _, nearest = run([{"gptq": {"bits": 3, "group_size": 16, "head_bits": 0, "embedding_bits": 0}}])
    _, after = run([options], checkpoint=tmp_path)
    errors, others = (p.history[-1].notes["layer_errors"] for p in (after, nearest))
    assert sum(errors.values()) < sum(others.values())
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert len(kept) == len(errors)
    kept[3].unlink()
    _, again = run([options], checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(after.weights().values(), again.weights().values(), strict=True))


def test_text_of_a_layer():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(20, 4)

        def forward(self, x):
            return self.up(x).relu()

    program = capture(Layer(), {"x": torch.randn(64, 20)})
    data = [{"x": torch.randn(64, 20, generator=torch.Generator().manual_seed(0))}]
    after = Spqr(threshold=NONE).run(program, Context(CPU, calibration=data)).program
    assert after.text(shapes=False) == (
        "%x\n"
        "%1 = spqr_linear(%x, up.weight_int3, up.weight_scale, up.weight_zero_point, up.weight_statistics, "
        "up.weight_values, up.weight_columns, up.weight_starts, up.bias, int3, 16, int3, 16)\n"
        "%2 = relu(%1)\n"
        "return [%2]\n"
    )


def test_backends_without_a_kernel_say_so():
    _, after = run(["spqr"])
    for name, expected in (("inductor", "dequantized in memory"), ("tvm", "no kernel for spqr_linear")):
        found = coverage(after, backend(name), CPU)
        assert expected in found.reasons["spqr_linear"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 12}, "multiple of 8"),
        ({"statistic_group": 12}, "multiple of 8"),
        ({"layers": {"x": {"symmetric": True}}}, "integers with zero points"),
        ({"layers": {"x": {"format": "nf4", "symmetric": True}}}, "integers with zero points"),
    ],
)
def test_options_that_make_no_scheme_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Spqr(**options)


def test_weights_that_are_no_numbers_or_too_large_are_refused():
    statistics = hessian(correlated(50, 32))
    with pytest.raises(PassError, match="NaN or infinite"):
        solve(torch.full((4, 32), float("nan")), statistics)
    with pytest.raises(PassError, match="do not fit float16"):
        solve(torch.randn(4, 32) * 1e9, statistics)
    assert packing.FORMATS["int3"].high == 7
