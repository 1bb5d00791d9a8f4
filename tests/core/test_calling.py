"""What executables do with their arguments before kernels see them."""

import pytest
import torch

from graphwright.calling import Arguments
from graphwright.contract import Contract, Dim, InputSpec, StateSpec
from graphwright.errors import BackendError

CONTRACT = Contract(
    inputs=(
        InputSpec("input_ids", torch.int64, ("batch", "sequence"), role="token"),
        InputSpec("key_positions", torch.int64, ("keys",), role="key_position"),
    ),
    outputs=("logits",),
    dims=(Dim("batch", 1, 8), Dim("sequence", 1, 8), Dim("keys", 1, 64), Dim("capacity", 2, 64)),
    state=(StateSpec("cache", torch.float32, ("batch", 3, "capacity", 5)),),
)


def tensors(keys: int = 4, capacity: int = 5) -> dict[str, torch.Tensor]:
    return {
        "cache": torch.zeros(2, 3, capacity, 5),
        "key_positions": torch.arange(keys),
        "input_ids": torch.arange(6).view(3, 2).T,
    }


def test_tensors_come_in_the_contracts_order_and_state_is_the_callers_own():
    given = tensors()
    found = Arguments(CONTRACT)(given)
    assert [t.shape for t in found] == [(2, 3), (4,), (2, 3, 5, 5)]
    assert found[0].is_contiguous()
    assert torch.equal(found[0], given["input_ids"])
    assert found[2] is given["cache"]


def test_the_scratch_slot_is_not_for_keys():
    Arguments(CONTRACT)(tensors(keys=4, capacity=5))
    with pytest.raises(BackendError, match="asks for 5 slots and the caches hold 4"):
        Arguments(CONTRACT)(tensors(keys=5, capacity=5))


def test_state_that_is_not_contiguous_is_refused():
    given = tensors()
    given["cache"] = given["cache"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(BackendError, match="State cache is not contiguous"):
        Arguments(CONTRACT)(given)


def test_one_token_of_one_sequence_is_a_decode_step():
    arguments = Arguments(CONTRACT)
    assert not arguments.one_token(tensors())
    assert arguments.one_token({"input_ids": torch.zeros(1, 1)})
    assert not arguments.one_token({"input_ids": torch.zeros(2, 1)})
