"""Softmax and sampling in the interpreter: values against PyTorch, draws against the distribution they come from."""

import pytest
import torch
from kernels.interpreted import TOLERANCE, runner

from graphwright.errors import BackendError
from graphwright.kernels.triton import sampling
from graphwright.numerics import relative_error


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
    for number in range(3):
        assert torch.equal(sampling.sample(runner(number), x, 0.0, 0), x.argmax(-1))


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(6)
    count = 200
    drawn = sampling.sample(runner(2), logits.expand(count, 6).contiguous(), 0.8, seed=3)
    frequency = torch.bincount(drawn, minlength=6) / count
    expected = (logits / 0.8).softmax(-1)
    # Five standard deviations of a binomial frequency.
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_a_draw_depends_on_seed_row_and_token_alone():
    logits = torch.randn(3, 4500, generator=torch.Generator().manual_seed(0))
    first = [sampling.sample(runner(number), logits, 1.0, seed=7) for number in range(3)]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    others = torch.stack([sampling.sample(runner(), logits[:, :40].contiguous(), 1.0, seed=seed) for seed in range(6)])
    assert others.unique(dim=0).shape[0] > 1


def test_what_cannot_be_drawn_is_not():
    logits = torch.full((20, 7), float("-inf"))
    logits[:, 4] = 0
    assert (sampling.sample(runner(), logits, 1.0, seed=1) == 4).all()
    with pytest.raises(BackendError, match="temperature is -1"):
        sampling.sample(runner(), logits, -1, 0)
