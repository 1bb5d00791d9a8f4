"""What the executable refuses and lets go of, with libraries that are plain functions."""

from types import SimpleNamespace

import pytest
import torch

from graphwright.backends.inductor import executable
from graphwright.backends.inductor.executable import InductorExecutable, Schedule, Step
from graphwright.contract import Contract, Dim, InputSpec, StateSpec
from graphwright.errors import BackendError

CONTRACT = Contract(
    inputs=(
        InputSpec("input_ids", torch.int64, ("batch",), "token", 9),
        InputSpec("key_positions", torch.int64, ("keys",), "key_position"),
    ),
    outputs=("out",),
    dims=(Dim("batch", 1, 4), Dim("keys", 1, 8), Dim("capacity", 2, 9)),
    state=(StateSpec("cache", torch.float32, ("batch", 1, "capacity", 2)),),
)
SCHEDULE = Schedule(
    slots=6,
    weights={"w": 0},
    inputs={"input_ids": 1, "key_positions": 2, "cache": 3},
    steps=(Step("body", (0, 1, 3), (4,)), Step("body", (0, 4, 3), (5,))),
    outputs=(5,),
    forms=("general",),
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    def body(values):
        values[2].add_(1)
        return [values[0] + values[1].float()]

    loaded = SimpleNamespace(loader=SimpleNamespace(run=body))
    monkeypatch.setattr(executable.torch._inductor, "aoti_load_package", lambda _path: loaded, raising=False)
    return InductorExecutable(SCHEDULE, CONTRACT, {"w": torch.ones(2)}, tmp_path)


def tensors(keys: int, cache: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([3, 4]), "key_positions": torch.arange(keys), "cache": cache}


def test_state_is_written_and_nothing_is_held(run):
    cache = torch.zeros(2, 1, 5, 2)
    (result,) = run(tensors(4, cache))
    assert result.tolist() == [5.0, 6.0]
    assert (cache == 2).all()
    assert all(run._slots[slot] is None for slot in (1, 3, 4, 5)), "only weights stay between calls"
    assert run(tensors(4, cache))[0].tolist() == [5.0, 6.0]


def test_more_keys_than_slots_are_refused(run):
    with pytest.raises(BackendError, match="asks for 5 slots and the caches hold 4"):
        run(tensors(5, torch.zeros(2, 1, 5, 2)))


def test_state_that_is_not_contiguous_is_refused(run):
    with pytest.raises(BackendError, match="State cache is not contiguous"):
        run(tensors(4, torch.zeros(2, 1, 2, 5).transpose(2, 3)))


def test_inputs_that_are_not_contiguous_are_copied(run):
    given = {**tensors(4, torch.zeros(2, 1, 5, 2)), "input_ids": torch.tensor([3, 0, 4, 0])[::2]}
    assert run(given)[0].tolist() == [5.0, 6.0]
