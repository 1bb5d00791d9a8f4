"""Windows, sinks and blocks: against dense masks, with caches, with positions shifted, and what is refused."""

import warnings

import pytest
import torch
from families.configs import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import batches, run

from graphwright.errors import PassError, RecipeError
from graphwright.match import argument
from graphwright.numerics import outputs_error, relative_error
from graphwright.ops import attention
from graphwright.ops.attention import visible_keys
from graphwright.program import Program
from graphwright.recipe import Recipe

LIMITS = [
    {"sliding_window": {"window": 6}},
    {"attention_sinks": {"window": 6, "sinks": 2}},
    {"block_sparse": {"block": 4, "local": 2}},
]


def limited(name: str, limit: dict, *more) -> tuple[Program, Program]:
    return run([limit, *more], name, calibration=batches(2, 24))


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    window=st.integers(0, 5),
    anchors=st.integers(0, 9),
    block=st.sampled_from([0, 1, 3, 8]),
    causal=st.booleans(),
)
def test_what_is_visible_is_what_the_forms_say(length, window, anchors, block, causal):
    reach = window * max(block, 1)
    steps = torch.arange(length)[None]
    found = visible_keys(steps, steps, causal=causal, window=reach, chunk=0, prefix=0, anchors=anchors, block=block)[0]
    for q in range(length):
        for k in range(length):
            near = not window or (abs(q // block - k // block) < window if block else abs(q - k) < window)
            assert bool(found[q, k]) == ((k <= q or not causal) and (near or min(q, k) < anchors))


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_limited_attention_is_dense_attention_with_that_mask(name, limit):
    before, after = limited(name, limit)
    record = after.history[-1]
    assert record.kind == "approximate"
    assert set(record.notes["layer_errors"]) == {"attention 0", "attention 1"}
    assert all(error > 0 for error in record.notes["layer_errors"].values())
    assert record.error > 0 and record.notes["kl"] > 0  # noqa: PT018
    # A text that is no longer than what is seen is read as before.
    seen = record.notes["keys_seen"]
    short = after.contract.draw({"batch": 1, "sequence": min(seen, 6)}, seed=2)
    assert outputs_error(after(**short), before(**short), short) < 1e-5
    long = after.contract.draw({"batch": 2, "sequence": 20}, seed=2)
    assert outputs_error(after(**long), before(**long), long) > 1e-2


def test_layers_are_chosen_and_windows_of_the_model_stay():
    _, after = limited("gemma3", {"sliding_window": {"window": 9}})
    assert [argument(node, "window") for node in after.calls(attention.target)] == [5, 5, 9]
    _, after = limited("llama", {"block_sparse": {"block": 4, "layers": [1]}})
    assert [argument(node, "block") for node in after.calls(attention.target)] == [0, 4]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_caches_come_behind(limit):
    """The pass that inserts caches compares them with the whole forward; rings are for windows without anchors."""
    _, after = limited("llama", limit, "static_cache")
    assert [r.name for r in after.history][-2:] == [next(iter(limit)), "static_cache"]
    slots = after.contract.state[0].shape[2]
    assert slots == (7 if "sliding_window" in limit else "capacity")


def one_layer() -> Program:
    from families.configs import build

    from graphwright.capture import capture

    return capture(build("llama", num_hidden_layers=1))


def test_shifted_positions_are_those_in_the_window():
    """In one layer: what a query sees is [sinks, last tokens], and their logits are those of that short text."""
    program, window, sinks = one_layer(), 7, 3
    plain, after = run([], program=program, calibration=[])[1], None
    _, after = run(
        [{"attention_sinks": {"window": window, "sinks": sinks, "shift": True}}],
        program=program, calibration=batches(2, 24),
    )  # fmt: skip
    ids = tokens(40)
    found = after(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    for last in (0, 5, 9, 10, 11, 25, 39):
        kept = (
            ids[:, : last + 1]
            if last < window + sinks
            else torch.cat([ids[:, :sinks], ids[:, last + 1 - window : last + 1]], 1)
        )
        expected = plain(input_ids=kept, attention_mask=torch.ones_like(kept))[0]
        assert relative_error(found[:, last], expected[:, -1]) < 1e-4
    _, cached = run(
        ["static_cache", {"attention_sinks": {"window": window, "sinks": sinks, "shift": True}}],
        program=program, calibration=batches(2, 24),
    )  # fmt: skip
    state = cached.contract.allocate({"batch": 1, "capacity": 41})
    for at in range(40):
        step = {
            "input_ids": ids[:, at : at + 1],
            "positions": torch.tensor([[at]]),
            "key_positions": torch.arange(at + 1),
        }
        assert relative_error(cached(**step, **state)[0][:, 0], found[:, at]) < 1e-4


def test_true_distances_give_other_numbers():
    program = one_layer()
    ids = tokens(40)
    mask = torch.ones_like(ids)
    first, second = (
        run(
            [{"attention_sinks": {"window": 7, "sinks": 3, "shift": shift}}],
            program=program,
            calibration=batches(1, 24),
        )[1]
        for shift in (True, False)
    )
    one, other = first(input_ids=ids, attention_mask=mask)[0], second(input_ids=ids, attention_mask=mask)[0]
    assert relative_error(one[:, :10], other[:, :10]) < 1e-4
    assert relative_error(one[:, 10:], other[:, 10:]) > 1e-2


def test_texts_too_short_to_measure_are_said():
    with pytest.warns(UserWarning, match="lets a query see 40 keys and calibration text is 24 tokens long"):
        limited("llama", {"sliding_window": {"window": 40}})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not measured.*")
        limited("llama", {"sliding_window": {"window": 23}})


def test_golden_text():
    _, after = limited("llama", {"attention_sinks": {"window": 6, "sinks": 2}})
    line = next(line for line in after.text().splitlines() if "attention(" in line)
    assert line.split(" = ")[1] == (
        "attention(%21, %22, %20, None, %6, None, None, None, scale=0.25, causal=True, window=6, anchors=2)"
        " : float32[batch, 4, sequence, 16]"
    )


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("sliding_window", "window", 0), ("sliding_window", "window", -3), ("attention_sinks", "window", 0),
     ("attention_sinks", "sinks", 0), ("block_sparse", "block", 0), ("block_sparse", "local", 0),
     ("block_sparse", "global_blocks", -1)],
)  # fmt: skip
def test_windows_of_nothing_are_refused(name, option, value):
    given_ = {} if name == "block_sparse" else {"window": 8}
    with pytest.raises(RecipeError, match=option):
        Recipe.load({"passes": [{name: {**given_, option: value}}]})


def test_what_is_refused():
    with pytest.raises(PassError, match="would see 600 keys, and the longest text has 512"):
        limited("llama", {"sliding_window": {"window": 600}})
    with pytest.raises(PassError, match="There is no attention 2.*They have the numbers 0 to 1"):
        limited("llama", {"sliding_window": {"window": 6, "layers": [2]}})
    with pytest.raises(RecipeError, match="excludes limited_attention"):
        limited("llama", {"sliding_window": {"window": 6}}, {"block_sparse": {}})
    with pytest.raises(PassError, match="shifted where rotations make the scores"):
        limited("gpt2", {"attention_sinks": {"window": 6, "shift": True}})
    with pytest.raises(PassError, match="No attention sees the whole text"):
        limited("mistral", {"sliding_window": {"window": 6}})
    _, cached = run(["static_cache"])
    with pytest.raises(PassError, match="sliding_window would undo static_cache"):
        run([{"sliding_window": {"window": 6}}], program=cached)
