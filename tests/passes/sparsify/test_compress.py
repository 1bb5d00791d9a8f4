"""Storage of pruned weights: exact, smaller, restored bit for bit, kept where it would not get smaller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import batches, run

from graphwright.errors import PassError
from graphwright.feeding import logits_of
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import quantized_linear, sparse_linear
from graphwright.ops.sparse_linear import on_tensor_cores
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.registry import backend
from graphwright.sparsity import (
    Pattern,
    blocks_kept,
    compress_for_tensor_cores,
    expand_from_tensor_cores,
    from_blocks,
    to_blocks,
)
from graphwright.structure import head
from graphwright.target import GPUS


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    block=st.sampled_from([(1, 1), (4, 8), (3, 5)]),
    kept=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_blocks_are_undone_bit_for_bit(rows, columns, block, kept):
    shape = rows * block[0], columns * block[1]
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < kept)
    values, places = to_blocks(weight, weight != 0, *block)
    assert torch.equal(from_blocks(values, blocks_kept(places, columns), *block), weight)
    stored_blocks = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).ne(0).any(3).any(1).sum()
    assert values.numel() == int(stored_blocks) * block[0] * block[1]


def stored(program: Program) -> int:
    return sum(tensor.nbytes for tensor in program.weights().values())


@pytest.mark.parametrize(
    ("pattern", "layout"), [("unstructured", "1x1"), ("4:8", "1x1"), ("2:4", "2:4"), ("8x16", "8x16"), ("16x4", "16x4")]
)
def test_pruned_layers_get_smaller_and_stay_what_they_were(pattern, layout, tmp_path):
    passes = ["merge_linear", {"magnitude": {"pattern": pattern}}, "static_cache"]
    _, pruned = run(passes)
    _, after = run([*passes, "compress_sparse"])
    record = after.history[-1]
    assert record.error < 1e-5
    assert stored(pruned) - stored(after) == record.notes["bytes_saved"] > 0
    assert record.notes["layouts"] == {layout: len(list(after.calls(sparse_linear.target)))}
    assert ("none for" in record.notes.get("kernel", "")) == (layout != "2:4")
    for node in after.calls(sparse_linear.target):
        rows, width = node.args[9], node.args[0].meta["val"].shape[-1]
        weights = sum(after.weight(node.args[place]).nbytes for place in (1, 2))
        if layout == "2:4":
            assert weights * 8 == rows * width * 17
        if layout == "8x16":
            assert weights == rows * width * 4 // 2 + rows // 8 * -(-width // 16 // 8)
    after.save(tmp_path)
    assert Program.load(tmp_path).text(shapes=False) == after.text(shapes=False)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_codes_lose_their_zeros_too(bits, symmetric, pattern):
    options = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    passes = [{"magnitude": {"pattern": pattern, "ratio": None if pattern == "2:4" else 0.6}}, {"rtn": options}]
    _, after = run([*passes, "compress_sparse"])
    record = after.history[-1]
    assert record.name == "compress_sparse"
    assert record.error < 1e-5
    assert len(list(after.calls(sparse_linear.target))) == 14
    assert len(list(after.calls(quantized_linear.target))) == 1
    node = next(iter(after.calls(sparse_linear.target)))
    per_weight = sum(after.weight(node.args[place]).nbytes for place in (1, 2)) * 8 / 64 / node.args[9]
    # Half the values and a bit each; of single weights what is left after rounding, at most two fifths.
    assert per_weight == bits / 2 + 1 if pattern == "2:4" else per_weight <= bits * 0.42 + 1


def test_the_joint_solve_in_four_bits_takes_three():
    joint = {"sparse_gptq": {"pattern": "2:4", "bits": 4, "group_size": 32}}
    _, dense = run([joint], calibration=batches(2))
    _, after = run([joint, "compress_sparse"], calibration=batches(2))
    assert after.history[-1].error < 1e-5
    codes = sum(dense.weight(n.args[1]).nbytes for n in dense.calls(quantized_linear.target) if n is not head(dense))
    assert after.history[-1].notes["bytes_saved"] == codes // 4


def test_what_would_not_get_smaller_stays():
    _, after = run(["compress_sparse"])
    assert after.history[-1].sites == 0


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), kept=st.floats(0, 1), half=st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_layout_of_tensor_cores_is_undone_bit_for_bit(rows, columns, kept, half):
    generator = torch.Generator().manual_seed(rows)
    shape = 32 * rows, 64 * columns
    weight = torch.randn(*shape, generator=generator).to(torch.float16 if half else torch.bfloat16)
    weight *= Pattern(2, 4).keep(torch.rand(*shape, generator=generator), 0.5)
    weight *= torch.rand(*shape, generator=generator) <= kept
    values, metadata = compress_for_tensor_cores(weight)
    assert torch.equal(expand_from_tensor_cores(values, metadata), weight)
    assert (values.nbytes + metadata.nbytes) * 8 == weight.numel() * 9


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(32, 64), "float16 or bfloat16 is needed"),
        (torch.zeros(16, 64, dtype=torch.float16), "multiples of 32 x 64"),
        (torch.zeros(32, 96, dtype=torch.float16), "multiples of 32 x 64"),
        (torch.ones(32, 64, dtype=torch.float16), "more than two non-zeros"),
    ],
)
def test_what_tensor_cores_cannot_read_is_refused(weight, message):
    with pytest.raises(PassError, match=message):
        compress_for_tensor_cores(weight)


def test_layers_get_the_layout_of_tensor_cores_where_they_fit(tmp_path):
    passes = [{"cast": {"dtype": "bfloat16"}}, {"magnitude": {"pattern": "2:4"}}]
    wanted = {"compress_sparse": {"tensor_cores": True}}
    before, pruned = run(passes)
    plan = plan_passes(Recipe.load({"passes": [*passes, wanted]}), before)
    after = PassManager(Context(GPUS["cuda:sm_80"])).run(before, plan)
    record = after.history[-1]
    assert record.notes["layouts"] == {"2:4 tensor cores": 12, "2:4": 2}
    assert record.notes["tensor_cores"] == [
        "a weight stays 2:4 because it has 64 x 96 values, and multiples of 32 x 64 are needed"
    ]
    assert record.error < 1e-2
    node = next(iter(after.calls(sparse_linear.target)))
    assert after.weight(node.args[2]).dtype == torch.int16
    assert "CUTLASS" in backend("triton").supports(node, GPUS["cuda:sm_80"]).reason
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(logits_of(after, ids), logits_of(pruned, ids))
    after.save(tmp_path)
    assert Program.load(tmp_path).text(shapes=False) == after.text(shapes=False)
    with pytest.raises(PassError, match="sparse tensor cores is for CUDA targets, and this one is cpu"):
        run([*passes, wanted])


@pytest.mark.parametrize("rows", [(1, 1), (2, 5), (8,)])
@pytest.mark.parametrize("biased", [True, False])
def test_tensor_cores_get_whole_groups_of_columns(rows, biased, monkeypatch):
    """What is handed to the kernel, which needs a GPU: here a plain product that keeps its rules stands in for it."""

    def product(values, metadata, columns):
        assert columns.shape[1] % 8 == 0
        assert columns.t().is_contiguous()
        assert columns.dtype == values.dtype
        return expand_from_tensor_cores(values, metadata) @ columns

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(torch.bfloat16)
    weight *= Pattern(2, 4).keep(weight.abs().float(), 0.5)
    x, bias = torch.randn(*rows, 128, generator=generator), torch.randn(64, generator=generator) if biased else None
    actual = on_tensor_cores(x, *compress_for_tensor_cores(weight), bias)
    assert (actual.shape, actual.dtype) == ((*rows, 64), x.dtype)
    assert relative_error(actual, torch.nn.functional.linear(x, weight.float(), bias)) < 1e-2
