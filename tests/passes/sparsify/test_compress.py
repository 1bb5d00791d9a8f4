"""Storage of pruned weights: exact, smaller, restored bit for bit, kept where it would not get smaller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import run

from graphwright.ops import quantized_linear, sparse_linear
from graphwright.program import Program
from graphwright.sparsity import from_bitmask, to_bitmask


@given(rows=st.integers(1, 9), width=st.integers(1, 40), kept=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_bitmask_round_trip(rows, width, kept):
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(rows, width, generator=generator) * (torch.rand(rows, width, generator=generator) < kept)
    assert torch.equal(from_bitmask(*to_bitmask(weight), width), weight)


def stored(program: Program) -> int:
    return sum(tensor.nbytes for tensor in program.weights().values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruned_layers_get_smaller_and_stay_what_they_were(name, pattern, tmp_path):
    passes = ["merge_linear", {"magnitude": {"pattern": pattern}}, "static_cache"]
    _, pruned = run(passes, name)
    _, after = run([*passes, "compress_sparse"], name)
    record = after.history[-1]
    assert record.error < 1e-5
    assert stored(pruned) - stored(after) == record.notes["bytes_saved"] > 0
    assert "none on this target" in record.notes["kernel"]
    (layout,) = {node.args[6] for node in after.calls(sparse_linear.target)}
    assert layout == ("2:4" if pattern == "2:4" else "bitmask")
    after.save(tmp_path)
    assert Program.load(tmp_path).text(shapes=False) == after.text(shapes=False)


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bit_halves(symmetric):
    options = {"bits": 8, "group_size": 32, "symmetric": symmetric}
    _, after = run(["compress_sparse", {"magnitude": {"pattern": "2:4"}}, {"rtn": options}])
    record = after.history[-1]
    assert record.name == "compress_sparse"
    assert record.error < 1e-5
    assert len(list(after.calls(sparse_linear.target))) == 14
    assert len(list(after.calls(quantized_linear.target))) == 1


def test_what_would_not_get_smaller_stays():
    _, after = run(["compress_sparse"])
    assert after.history[-1].sites == 0
