"""Trees of guesses in a program: nothing changes without guesses, and a branch does not see the other."""

import pytest
import torch
from passes.quantize.quantizing import run

from graphwright.errors import PassError, RecipeError
from graphwright.numerics import relative_error

PASSES = ["static_cache", "tree_verification"]


def test_golden_text():
    _, after = run(PASSES, calibration=[])
    text = after.text()
    assert "%slots : int64[batch, sequence]" in text
    assert "%tree_mask : float32[sequence, keys]" in text
    assert after.contract.outputs[-1] == "hidden"
    record = after.history[-1]
    assert (record.name, record.sites) == ("tree_verification", 2)
    assert record.error < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_neox"])
def test_each_branch_is_a_text_of_its_own(name):
    """Behind four tokens two branches of two: the logits of each are those of the text without the other."""
    plain, after = run([], name, calibration=[])[1], run(PASSES, name, calibration=[])[1]
    text, left, right = [5, 9, 3, 7], [11, 12], [21, 22]
    state = after.contract.allocate({"batch": 1, "capacity": 16})
    inputs = {"input_ids": torch.tensor([text]), "positions": torch.arange(4)[None], "slots": torch.arange(4)[None]}
    after(**inputs, key_positions=torch.arange(4), tree_mask=torch.zeros(4, 4), **state)
    mask = torch.zeros(4, 8)
    mask[:2, 6:], mask[2:, 4:6] = float("-inf"), float("-inf")
    places = torch.tensor([[4, 5, 4, 5]])
    logits, hidden = after(
        input_ids=torch.tensor([left + right]), positions=places, slots=torch.arange(4, 8)[None],
        key_positions=torch.cat([torch.arange(4), places[0]]), tree_mask=mask, **state,
    )  # fmt: skip
    assert hidden.shape[:2] == (1, 4)
    for branch, at in ((left, slice(0, 2)), (right, slice(2, 4))):
        ids = torch.tensor([text + branch])
        expected = plain(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 4:]
        assert relative_error(logits[:, at], expected) < 1e-4


def test_what_is_refused():
    with pytest.raises(PassError, match="does not hold each token in the slot of its position"):
        run(PASSES, "mistral", calibration=[])
    with pytest.raises(RecipeError, match="kv_cache"):
        run(["tree_verification", "explicit_cache"], calibration=[])
