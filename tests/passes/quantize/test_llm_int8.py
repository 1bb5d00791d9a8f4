"""LLM.int8(): outliers in the inputs cost nothing; no outliers is plain W8A8, all of them is floating point."""

import pytest
import torch
from passes.quantize.quantizing import run

from graphwright.capture import capture
from graphwright.numerics import relative_error

PLAIN = [
    {"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32", "embedding_bits": 0}},
    "activations",
]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(96, 40)

    def forward(self, x):
        return self.linear(x)


def inputs(spiked: bool) -> dict[str, torch.Tensor]:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    if spiked:
        x[:, [3, 50, 70]] *= 60
    return {"x": x}


def error(passes: list, spiked: bool) -> float:
    torch.manual_seed(0)
    program = capture(Layer(), inputs(spiked))
    _, after = run(passes, program=program, calibration=[inputs(spiked)])
    (actual,), (expected,) = after(**inputs(spiked)), program(**inputs(spiked))
    return float((actual - expected).norm() / expected.norm())


def test_outliers_stay_exact_and_widen_no_scale():
    assert error(["llm_int8"], spiked=True) < 0.01
    assert error(PLAIN, spiked=True) > 3 * error(["llm_int8"], spiked=True)


def test_an_infinite_threshold_is_plain_w8a8():
    for spiked in (False, True):
        assert error([{"llm_int8": {"threshold": 1e9}}], spiked) == pytest.approx(error(PLAIN, spiked), rel=1e-5)


def test_a_tiny_threshold_keeps_everything_in_floating_point():
    assert error([{"llm_int8": {"threshold": 1e-9}}], spiked=True) < 1e-6


@pytest.mark.parametrize("prefix", [[], ["merge_linear", "static_cache", "select_logits"]], ids=["plain", "cached"])
def test_it_runs_on_a_model(prefix):
    before, after = run([*prefix, {"llm_int8": {"threshold": 2.0}}])
    record = after.history[-1]
    assert max(record.notes["outliers"].values()) > 0
    assert record.notes["kl"] < 0.1
    if not prefix:
        drawn = before.contract.draw({"batch": 2, "sequence": 5})
        assert relative_error(after(**drawn)[0], before(**drawn)[0]) < 0.5
