"""Contracts: what they draw, what they refuse, and their JSON."""

import pytest
import torch

from graphwright.contract import Contract, Dim, InputSpec, StateSpec
from graphwright.errors import GraphwrightError

CONTRACT = Contract(
    inputs=(
        InputSpec("input_ids", torch.int64, ("batch", "sequence"), "token", 50),
        InputSpec("attention_mask", torch.int64, ("batch", "sequence"), "attention_mask"),
    ),
    outputs=("logits",),
    dims=(Dim("batch", 1, 8), Dim("sequence", 1, 16), Dim("capacity", 2, 17)),
    state=(StateSpec("cache", torch.float32, ("batch", "capacity", 4)),),
)


def test_drawn_inputs_fit_and_repeat():
    tensors = CONTRACT.draw({"batch": 3, "sequence": 9}, seed=5)
    again = CONTRACT.draw({"batch": 3, "sequence": 9}, seed=5)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert tensors["input_ids"].max() < 50
    mask = tensors["attention_mask"]
    assert mask[0].all()
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "padding is on the right"
    state = CONTRACT.allocate({"batch": 3, "capacity": 10})
    assert CONTRACT.check({**tensors, **state}) == {"batch": 3, "sequence": 9, "capacity": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 4)}, r"input_ids should be int64\[.*\] and is float32"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, "should be"),
        ({"attention_mask": torch.zeros(2, 5, dtype=torch.int64)}, "Dimension sequence is 4 .* and 5"),
        ({"input_ids": torch.zeros(2, 17, dtype=torch.int64)}, "sequence of input input_ids is 17; .* 1 to 16"),
        ({"cache": torch.zeros(2, 5, 3)}, "cache should be"),
    ],
)
def test_wrong_tensors_are_named(change, message):
    tensors = {**CONTRACT.draw({"batch": 2, "sequence": 4}), **CONTRACT.allocate({"batch": 2, "capacity": 5})}
    with pytest.raises(GraphwrightError, match=message):
        CONTRACT.check({**tensors, **change})


def test_missing_input_is_named():
    with pytest.raises(GraphwrightError, match="attention_mask is missing"):
        CONTRACT.check({"input_ids": torch.zeros(1, 1, dtype=torch.int64)})


def test_json_round_trip():
    assert Contract.from_json(CONTRACT.to_json()) == CONTRACT


def test_a_dimension_of_another_follows_it():
    dims = (Dim("batch"), Dim("capacity", 2, 100), Dim("groups", 1, 25, of="capacity", per=4))
    state = (StateSpec("scale", torch.float16, ("batch", "groups", 3)),)
    contract = Contract((), (), dims, state)
    for capacity, groups in ((2, 1), (4, 1), (5, 2), (33, 9)):
        assert contract.allocate({"batch": 2, "capacity": capacity})["scale"].shape == (2, groups, 3)
        assert contract.sizes({"capacity": capacity})["groups"] == groups
    assert Contract.from_json(contract.to_json()) == contract


def test_drawn_block_tables_share_no_block():
    spec = InputSpec("table", torch.int64, ("batch", "table"), "block_table", 16)
    contract = Contract((spec,), (), (Dim("batch"), Dim("table")))
    drawn = contract.draw({"batch": 3, "table": 4})["table"]
    assert sorted(drawn.flatten().tolist()) == list(range(12))
