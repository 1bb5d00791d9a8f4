"""Softmax and sampling in the interpreter: values against PyTorch, tokens against those that the op chooses."""

import pytest
import torch
from kernels.interpreted import TOLERANCE, runner

from graphwright.errors import BackendError
from graphwright.kernels.triton import sampling
from graphwright.numerics import relative_error
from graphwright.ops import sample_tokens as op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 17, 4097])
def test_softmax(width, dtype):
    torch.manual_seed(0)
    x = (torch.randn(3, width) * 5).to(dtype)
    x[0, : width // 2] = float("-inf")
    expected = (x.float() / 0.7).softmax(-1).to(dtype)
    assert relative_error(sampling.softmax(runner(), x, 0.7), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [1, 17, 9000])
def test_greedy_is_argmax_and_takes_the_first_of_equals(width):
    torch.manual_seed(0)
    x = torch.randint(0, 4, (5, width)).float()
    x[1], x[2, -1] = float("-inf"), float("inf")
    for number in range(3):
        found = sampling.sample_tokens(runner(number), x, torch.zeros(5, dtype=torch.float64), 0.0, 5, 0.5, 0.1)
        assert torch.equal(found, x.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 0.8, 0.0), (0, 0.6, 0.2)])
@pytest.mark.parametrize("width", [1, 301])
def test_one_number_draws_the_token_that_the_op_draws(width, top_k, top_p, min_p, dtype):
    torch.manual_seed(width)
    # No two alike, so that the border of top-p is one token; float16 tells these apart.
    logits = torch.stack([torch.randperm(width) for _ in range(3)]) / width * 16 - 12
    uniform = torch.tensor([0.0, 0.7, 1 - 2**-53], dtype=torch.float64)
    arguments = (logits.to(dtype), uniform, 0.7, top_k, top_p, min_p)
    found = sampling.sample_tokens(runner(width), *arguments)
    assert torch.equal(found, op.reference(*arguments))


def test_ties_of_top_k_stay_and_the_first_of_top_p():
    logits = torch.tensor([[1.0, 2.0, -0.0, 2.0, 0.0, 2.0]]).repeat(8, 1)
    uniform = torch.linspace(0, 1, 9, dtype=torch.float64)[:8]
    drawn = sampling.sample_tokens(runner(1), logits, uniform, 1.0, 2, 1.0, 0.0)
    assert drawn.unique().tolist() == [1, 3, 5]
    assert torch.equal(drawn, op.reference(logits, uniform, 1.0, 2, 1.0, 0.0))
    # Each of the three holds 0.26 of the probability.
    assert sampling.sample_tokens(runner(), logits, uniform, 1.0, 0, 0.4, 0.0).unique().tolist() == [1, 3]


def test_rows_may_lie_apart():
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))[:, -1]
    arguments = (logits, torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64), 1.0, 9, 0.9, 0.0)
    assert torch.equal(sampling.sample_tokens(runner(), *arguments), op.reference(*arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_told(temperature):
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    logits[1, 4321], logits[2, 7] = float("nan"), 50.0
    arguments = (logits, torch.full((3,), 0.5, dtype=torch.float64), temperature, 0, 1.0, 0.0)
    found = sampling.sample_tokens(runner(), *arguments)
    assert torch.equal(found, op.reference(*arguments))
    assert found[1] == -1


def test_what_cannot_be_drawn_is_not():
    logits, uniform = torch.full((3, 7), float("-inf")), torch.rand(3, dtype=torch.float64)
    logits[:, 4] = 0
    assert (sampling.sample_tokens(runner(), logits, uniform, 1.0, 3, 0.9, 0.1) == 4).all()
    with pytest.raises(BackendError, match="temperature is -1"):
        sampling.sample_tokens(runner(), logits, uniform, -1, 0, 1.0, 0.0)
