"""Pruning of weights: patterns hold exactly, scores follow the papers, SparseGPT beats Wanda beats magnitude."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import CPU, batches, correlated, hessian, run

from graphwright import rounding
from graphwright.calibration import Hessian
from graphwright.errors import PassError, RecipeError
from graphwright.manager import PassManager, plan_passes
from graphwright.ops import quantized_linear
from graphwright.packing import dequantize
from graphwright.pass_ import Context
from graphwright.passes.quantize.gptq import Gptq
from graphwright.passes.quantize.rtn import Rtn
from graphwright.passes.sparsify.magnitude import Magnitude
from graphwright.passes.sparsify.sparse_gptq import SparseGptq
from graphwright.passes.sparsify.sparsegpt import SparseGpt
from graphwright.passes.sparsify.wanda import Wanda
from graphwright.recipe import Recipe
from graphwright.sparsity import Pattern, compress, expand
from graphwright.structure import head, linears

METHODS = (Magnitude, Wanda, SparseGpt)


def layer(rows: int = 24, width: int = 96) -> tuple[torch.Tensor, Hessian]:
    generator = torch.Generator().manual_seed(rows + width)
    spread = 2.0 ** torch.randint(-2, 3, (width,), generator=generator)
    return torch.randn(rows, width, generator=generator), hessian(correlated(400, width) * spread)


@given(
    ratio=st.floats(0.01, 0.99),
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    per_row=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_ratio_removes_exactly_so_many_and_the_lowest(ratio, rows, width, per_row):
    scores = torch.rand(rows, width, generator=torch.Generator().manual_seed(width))
    keep = Pattern().keep(scores, ratio, per_row=per_row)
    for kept, values in zip(*(((keep, scores)) if per_row else (keep.view(1, -1), scores.view(1, -1))), strict=True):
        assert int((~kept).sum()) == int(ratio * len(kept))
        if kept.any() and not kept.all():
            assert values[~kept].max() <= values[kept].min()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "group", "kept"), [("2:4", 4, 2), ("4:8", 8, 4), ("1:3", 3, 1)])
def test_every_group_keeps_its_share(method, pattern, group, kept):
    weight, statistics = layer()
    pruned = method(pattern=pattern).prune(weight, statistics)
    assert ((pruned.unflatten(1, (-1, group)) != 0).sum(-1) == kept).all()


@pytest.mark.parametrize("method", METHODS)
def test_blocks_go_as_a_whole(method):
    weight, statistics = layer()
    pruned = method(pattern="8x16", ratio=0.5).prune(weight, statistics)
    counts = (pruned != 0).float().unflatten(1, (-1, 16)).unflatten(0, (-1, 8)).sum((1, 3))
    assert set(counts.flatten().tolist()) == {0.0, 128.0}
    assert int((counts == 0).sum()) == 9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_the_ratio_is_met(method, ratio):
    weight, statistics = layer(40, 144)
    pruned = method(ratio=ratio).prune(weight, statistics)
    assert float((pruned == 0).float().mean()) == pytest.approx(ratio, abs=0.01)


def test_wanda_prunes_each_row_alike_and_reduces_to_magnitude_per_row():
    weight, _ = layer()
    pruned = Wanda(ratio=0.3).prune(weight, Hessian(torch.eye(96), 1))
    assert ((pruned == 0).sum(1) == 28).all()
    assert torch.equal(pruned != 0, Pattern().keep(weight.abs(), 0.3, per_row=True))


def test_sparsegpt_with_independent_inputs_is_magnitude_per_block_without_update():
    weight, _ = layer()
    pruned = SparseGpt(ratio=0.5, block_size=32).prune(weight, Hessian(torch.eye(96), 1))
    for start in range(0, 96, 32):
        part = weight[:, start : start + 32]
        assert torch.equal(pruned[:, start : start + 32], part * Pattern().keep(part.abs(), 0.5))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("width", [96, 160])
def test_sparsegpt_beats_wanda_beats_magnitude(pattern, width):
    weight, statistics = layer(32, width)
    errors = [
        rounding.output_error(weight, method(pattern=pattern).prune(weight, statistics), statistics.matrix)
        for method in (SparseGpt, Wanda, Magnitude)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert errors[1] < errors[2]


def test_a_removal_is_compensated_as_least_squares_would():
    # One column is pruned first; what follows must be the least-squares solution over the columns that are left.
    x, weight = correlated(60, 6).double().float(), torch.tensor([[1e-4, 5.0, -4.0, 3.0, 6.0, -7.0]])
    pruned = SparseGpt(ratio=0.17, damping=1e-9).prune(weight, hessian(x))
    assert pruned[0, 0] == 0
    wanted = torch.linalg.lstsq(x[:, 1:].double(), x.double() @ weight[0].double()).solution
    assert torch.allclose(pruned[0, 1:].double(), wanted, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:16"])
def test_the_joint_solve_keeps_the_pattern_and_beats_one_after_the_other(pattern, symmetric):
    weight, statistics = layer(32, 160)
    options = {"bits": 4, "group_size": 32, "symmetric": symmetric}
    joint = SparseGptq(pattern=pattern, **options)
    dense = joint.solve(weight, joint.scheme(), statistics).dense()
    pattern_of = Pattern.parse(pattern)
    if pattern_of.of:
        assert ((dense.unflatten(1, (-1, pattern_of.of)) != 0).sum(-1) <= pattern_of.kept).all()
    assert float((dense == 0).float().mean()) > (pattern_of.ratio or 0.5) - 0.01
    wanda = Wanda(pattern=pattern).prune(weight, statistics)
    apart = rounding.quantize(wanda, joint.scheme()).dense()
    assert ((apart == 0) | (wanda != 0)).all()
    errors = [rounding.output_error(weight, found, statistics.matrix) for found in (dense, apart)]
    assert errors[0] < errors[1]


def test_gptq_keeps_what_is_pruned_and_moves_the_rest():
    weight, statistics = layer()
    pruned = Wanda(pattern="2:4").prune(weight, statistics)
    gptq = Gptq(bits=3, group_size=32)
    dense = gptq.solve(pruned, gptq.scheme(), statistics).dense()
    assert (dense[pruned == 0] == 0).all()
    nearest = rounding.quantize(pruned, gptq.scheme()).dense()
    assert rounding.output_error(pruned, dense, statistics.matrix) < rounding.output_error(
        pruned, nearest, statistics.matrix
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
@pytest.mark.parametrize("passes", [["magnitude"], [{"wanda": {"pattern": "2:4"}}], ["sparsegpt"]])
def test_every_layer_but_the_head_of_a_family_is_pruned(name, passes):
    before, after = run(["merge_linear", *passes, "static_cache"], name)
    assert [w.shape for w in before.weights().values()]
    last = head(after)
    for node, weight in linears(after):
        zeros = float((after.weight(weight) == 0).float().mean())
        assert zeros == 0 if node is last else zeros == pytest.approx(0.5, abs=0.02)
    record = next(r for r in after.history if r.notes.get("layer_errors"))
    assert all(0 < error < 1 for error in record.notes["layer_errors"].values())


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "awq", "nf4"])
def test_quantizing_comes_later_and_keeps_the_zeros(quantizer):
    _, after = run([{"wanda": {"pattern": "2:4"}}, quantizer, "merge_linear"])
    assert [r.name for r in after.history][-3:] == ["merge_linear", "wanda", quantizer]
    for node in after.calls(quantized_linear.target):
        if node is head(after):
            continue
        codes, scale, zero = (after.weight(a) if a is not None else None for a in node.args[1:4])
        dense = dequantize(codes, scale, zero, *node.args[5:7])
        assert ((dense.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


def test_illegal_orders_are_refused():
    _, quantized = run(["rtn"])
    with pytest.raises(PassError, match="wanda would undo rtn.*quantized already"):
        run(["wanda"], program=quantized)
    with pytest.raises(RecipeError, match="hqq excludes sparse, which comes from magnitude"):
        run(["magnitude", "hqq"])
    with pytest.raises(RecipeError, match="excludes sparse"):
        run(["magnitude", "wanda"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"pattern": "2:4", "ratio": 0.7}, "2:4 removes 0.5"),
        ({"pattern": "4:4"}, "no pattern"),
        ({"pattern": "0x4"}, "no pattern"),
        ({"pattern": "two"}, "no pattern"),
        ({"skip": ["("]}, "not a regular expression"),
    ],
)
@pytest.mark.parametrize("name", ["magnitude", "sparsegpt"])
def test_bad_options_are_refused_when_the_recipe_is_read(name, options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load({"passes": [{name: options}]})


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "8x16"])
def test_errors_are_the_scores_of_what_was_removed(pattern):
    # Without an update the squared error of the weight, and with independent inputs that of the output, are sums.
    weight, _ = layer()
    pruned = Magnitude(pattern=pattern).prune(weight, None)
    kept = Pattern.parse(pattern).keep(weight.square(), 0.5)
    assert float((weight - pruned).square().sum()) == pytest.approx(float(weight.square()[~kept].sum()), rel=1e-5)
    norms = torch.linspace(0.1, 3, 96)
    statistics = Hessian(torch.diag(norms.square()), 1)
    scores = (weight * norms).square()
    kept = Pattern.parse(pattern).keep(scores, 0.5, per_row=True)
    difference = weight - Wanda(pattern=pattern).prune(weight, statistics)
    assert float((difference * norms).square().sum()) == pytest.approx(float(scores[~kept].sum()), rel=1e-5)


def test_scales_of_a_pruned_group_span_the_survivors():
    weight, statistics = layer()
    pruned = Wanda(pattern="2:4").prune(weight, statistics)
    done = rounding.quantize(pruned, Rtn(bits=4, group_size=32).scheme())
    groups = pruned.unflatten(1, (-1, 32))
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    assert torch.allclose(done.grid.scale.float(), span / 15, rtol=1e-3)
    assert (done.dense()[pruned == 0] == 0).all()


def test_a_singular_hessian_is_refused_with_its_layer():
    class Singular(SparseGpt):
        def collector(self):
            broken = Hessian()
            broken.add = lambda rows: setattr(broken, "matrix", -torch.eye(rows.shape[1]))
            return broken

    before, _ = run([])
    with pytest.raises(PassError, match="not positive definite, even with damping.*Use more or other") as refused:
        PassManager(Context(CPU, calibration=batches(1))).run(before, plan_passes(Recipe(passes=[Singular()]), before))
    assert "q_proj" in str(refused.value)


def test_layers_that_cannot_be_pruned_are_named():
    with pytest.raises(
        PassError, match="2:5 does not divide .* 64 is no multiple of 5.*nearest size that divides is 4"
    ) as e:
        run([{"magnitude": {"pattern": "2:5"}}])
    assert "q_proj" in str(e.value)
    with pytest.raises(PassError, match="No layer's weight matches nothing"):
        run([{"magnitude": {"skip": ["nothing"]}}])


def test_weights_that_are_not_finite_are_refused():
    before, _ = run([])
    program = before.clone()
    weight = next(t for n, t in program.weights().items() if "down_proj" in n)
    kept = weight.clone()
    weight.data[0, 0] = float("nan")
    try:
        with pytest.raises(PassError, match="NaN or infinite"):
            run(["magnitude"], program=program)
    finally:
        weight.data.copy_(kept)


def test_skipped_layers_stay_and_pruning_changes_no_shape():
    before, after = run([{"magnitude": {"skip": ["down_proj"]}}])
    old, new = before.weights(), after.weights()
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    for name, tensor in new.items():
        if "down_proj" in name:
            assert torch.equal(tensor, old[name])


@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 96)])
def test_two_in_four_are_stored_and_restored_bit_for_bit(shape):
    weight = Magnitude(pattern="2:4").prune(torch.randn(*shape), None)
    weight[0, :4] = 0
    values, places = compress(weight)
    assert values.numel() * 2 == weight.numel()
    assert torch.equal(expand(values, places), weight)
