"""Fewer key-value heads: exact where merged heads are equal, better methods lose less, everything behind composes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.quantize.quantizing import batches, correlated, run

from graphwright.errors import PassError, RecipeError
from graphwright.heads import Basis, Heads, attention_heads
from graphwright.numerics import outputs_error
from graphwright.ops import attention
from graphwright.passes.attention._merging import (
    HeadWeights,
    aligned,
    averaged,
    distances,
    joined,
    key_turn,
    similar,
    subspace,
    turn_to,
)
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.rewrite import Editor

METHODS = ("gqa_mean", "gqa_grouped", "gqa_aligned", "gqa_lstsq")
TURNING = ("gqa_aligned", "gqa_lstsq")
SHAPES = ("llama", "gpt2", "opt", "gpt_neox", "phi3")
"""Separate projections with rope, merged ones without, separate ones with biases, interleaved ones, merged with rope."""


def raised(name: str) -> Program:
    return run([], name, calibration=[])[1].clone()


def write(editor: Editor, node: torch.fx.Node, position: int, value: torch.Tensor) -> None:
    """Gives one call a weight of its own: clones of a program share tensors."""
    old = editor.program.weight(node.args[position])
    node.update_arg(position, editor.weight("planted", value.to(old.dtype), before=node))


def planted(name: str, kv_heads: int, turn=None, order=None) -> Program:
    """A program whose key-value heads are `kv_heads` different ones, repeated; each copy turned by `turn`."""
    program = raised(name)
    with Editor(program, "plant") as editor:
        for heads in attention_heads(program)[0]:
            source = torch.arange(heads.kv_heads) // (heads.kv_heads // kv_heads) * (heads.kv_heads // kv_heads)
            source = source if order is None else source[order]
            plant(editor, heads, source, turn)
    return program


def plant(editor: Editor, heads: Heads, source: torch.Tensor, turn) -> None:
    for side in (heads.key, heads.value):
        for position in (1, 2):
            if len(side.maker.args) <= position or side.maker.args[position] is None:
                continue
            value = editor.program.weight(side.maker.args[position]).clone().double()
            rows = value[side.rows[source]]
            if turn is not None:
                rows = torch.stack([turn(heads, side, head) @ r for head, r in enumerate(rows)])
            value[side.rows] = rows
            write(editor, side.maker, position, value)


def generated(seed: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def any_turn(heads: Heads, side, head: int) -> torch.Tensor:
    """A rotation that alignment may undo: within the pairs of rope for keys, any for values and without rope."""
    size = side.rows.shape[1]
    whole = generated(head, size)
    return whole if side is heads.value else key_turn(torch.eye(size, dtype=torch.float64), whole, heads.basis)


def kv_rows(program: Program) -> list[tuple[int, int]]:
    return [tuple(int(n.args[place].meta["val"].shape[1]) for place in (1, 2)) for n in program.calls(attention.target)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPES)
def test_equal_heads_are_merged_exactly(name, method):
    before = planted(name, 1)
    _, after = run([{method: {"groups": 1}}], program=before, calibration=batches(2, 12))
    for sizes in ({"batch": 2, "sequence": 7}, {"batch": 1, "sequence": 1}):
        inputs = before.contract.draw(sizes, seed=1)
        assert outputs_error(after(**inputs), before(**inputs), inputs) < 1e-4
    assert kv_rows(after) == [(1, 1)] * 2
    assert sum(t.numel() for t in after.weights().values()) < sum(t.numel() for t in before.weights().values())


@pytest.mark.parametrize("method", TURNING)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_turned_heads_are_merged_exactly_by_methods_that_turn(name, method):
    before = planted(name, 1, turn=any_turn)
    inputs = before.contract.draw({"batch": 2, "sequence": 7}, seed=1)
    _, after = run([{method: {"groups": 1}}], program=before, calibration=batches(4, 24))
    assert outputs_error(after(**inputs), before(**inputs), inputs) < 1e-3
    _, mean = run([{"gqa_mean": {"groups": 1}}], program=before, calibration=batches(1, 12))
    assert outputs_error(mean(**inputs), before(**inputs), inputs) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom_like"])
def test_scattered_equal_heads_are_found(name):
    """Heads 0, 3 and 1, 2 are equal: the order of heads has to change, with everything that counts query heads."""
    name = "gpt2" if name == "bloom_like" else name
    before = planted(name, 2, order=torch.tensor([0, 2, 3, 1]))
    inputs = before.contract.draw({"batch": 2, "sequence": 7}, seed=1)
    expected = before(**inputs)
    for method in METHODS[1:]:
        _, after = run([{method: {"groups": 2}}], program=before, calibration=batches(4, 24))
        assert outputs_error(after(**inputs), expected, inputs) < 1e-3
        assert kv_rows(after) == [(2, 2)] * 2
    _, mean = run([{"gqa_mean": {"groups": 2}}], program=before, calibration=batches(1, 12))
    assert outputs_error(mean(**inputs), expected, inputs) > 0.1


def test_constants_per_query_head_move_along():
    """gpt_oss has sinks; its two key-value heads are made equal to the other, which leaves an order to find."""
    before = planted("gpt_oss", 1)
    inputs = before.contract.draw({"batch": 2, "sequence": 7}, seed=1)
    _, after = run([{"gqa_mean": {"groups": 1}}], program=before, calibration=batches(1, 12))
    assert outputs_error(after(**inputs), before(**inputs), inputs) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_better_methods_lose_less(name):
    losses = []
    for method in METHODS[::2] + METHODS[3:]:
        _, after = run([{method: {"groups": 1}}], name, calibration=batches(12, 48))
        record = next(r for r in after.history if r.name == method)
        losses.append(record.notes["kl"])
        assert len(record.notes["layer_errors"]) == 2
    assert losses[2] < losses[1] < losses[0]


def test_caches_and_weights_shrink_and_everything_composes_behind():
    passes = ["static_cache", "merge_linear", {"gqa_lstsq": {"groups": 1}}, {"rtn": {"bits": 8}}]
    _, after = run(passes, "llama", calibration=batches(2, 12))
    names = [record.name for record in after.history]
    assert names.index("gqa_lstsq") < min(names.index(n) for n in ("static_cache", "merge_linear", "rtn"))
    assert all(spec.shape[1] == 1 for spec in after.contract.state)


def test_golden_text():
    """The new attention as the graph says it."""
    _, after = run([{"gqa_mean": {"groups": 1}}], "gpt_neox", calibration=batches(1, 12))
    lines = after.text().splitlines()
    at = next(index for index, line in enumerate(lines) if "attention(" in line)
    assert [line.split(" = ")[1].split(" : ")[0].split("(")[0] for line in lines[at - 11 : at + 1]] == [
        "linear", "reshape", "transpose.int", "rope", "linear", "reshape", "transpose.int", "rope",
        "linear", "reshape", "transpose.int", "attention",
    ]  # fmt: skip
    assert "gpt_neox.layers.0.attention.query_key_value.weight_1_kv_heads" in "\n".join(lines[at - 11 : at])


def test_what_is_refused():
    with pytest.raises(PassError, match="2 key-value heads cannot be cut into 3 equal groups.*Legal numbers are 1"):
        run([{"gqa_mean": {"groups": 3}}])
    with pytest.raises(PassError, match="all attentions have 2 key-value heads already"):
        run([{"gqa_mean": {"groups": 2}}])
    with pytest.raises(PassError, match="No attention can get fewer key-value heads"):
        run([{"gqa_mean": {"groups": 1}}], "deepseek_v2")
    for groups in (0, -1, 1.5):
        with pytest.raises(RecipeError, match="groups"):
            Recipe.load({"passes": [{"gqa_lstsq": {"groups": groups}}]})
    _, cached = run(["static_cache"])
    with pytest.raises(PassError, match="gqa_mean would undo static_cache"):
        run([{"gqa_mean": {"groups": 1}}], program=cached)


# Arithmetic


def head_weights(seed: int, heads: int, kv_heads: int, dim: int = 6, width: int = 20) -> HeadWeights:
    generator = torch.Generator().manual_seed(seed)
    make = lambda count: torch.randn(count, dim, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return HeadWeights(make(heads), make(kv_heads), make(kv_heads), make(heads))


def rope_basis(dim: int, rotary: int) -> Basis:
    return Basis(torch.arange(rotary).view(2, -1).t().contiguous(), torch.arange(rotary, dim))


def scores(weights: HeadWeights, x: torch.Tensor, basis: Basis, angle: float) -> torch.Tensor:
    """Scores [H, n, n] between inputs that are `angle` apart in every pair."""
    turn = torch.eye(weights.key.shape[1], dtype=torch.float64)
    cos, sin = torch.tensor([angle], dtype=torch.float64).cos(), torch.tensor([angle], dtype=torch.float64).sin()
    for first, second in basis.pairs.tolist():
        turn[first, first] = turn[second, second] = cos
        turn[first, second], turn[second, first] = -sin, sin
    key = (turn @ weights.key).repeat_interleave(weights.share, 0)
    return (weights.query @ x.t()).mT @ (key @ x.t())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rotary=st.sampled_from([0, 4, 6]), share=st.integers(1, 2), angle=st.floats(-3, 3))
def test_alignment_changes_no_score_and_no_output(seed, rotary, share, angle):
    weights, basis = head_weights(seed, 4 * share, 4), rope_basis(6, rotary)
    x = correlated(50, 20, seed).double()
    turned = aligned(weights, 2, basis, x.t() @ x, values=True)
    torch.testing.assert_close(scores(turned, x, basis, angle), scores(weights, x, basis, angle))
    mixed = [(x @ w.value.repeat_interleave(share, 0).mT) @ w.out for w in (weights, turned)]
    torch.testing.assert_close(mixed[1], mixed[0])
    gram = x.t() @ x

    def apart(w: HeadWeights) -> float:
        mean = averaged(w, 2)
        off = [(a - b.repeat_interleave(2, 0)) for a, b in ((w.key, mean.key), (w.value, mean.value))]
        return float(sum((one @ gram * one).sum() for one in off))

    assert apart(turned) <= apart(weights) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rotary=st.sampled_from([0, 4, 6]), share=st.integers(1, 2))
def test_least_squares_is_never_worse_than_the_aligned_mean(seed, rotary, share):
    weights, basis = head_weights(seed, 4 * share, 4), rope_basis(6, rotary)
    x = correlated(60, 20, seed).double()
    gram = x.t() @ x
    mean = averaged(aligned(weights, 2, basis, gram, values=True), 2)
    best = joined(weights, 2, basis, gram, values=True)
    angles = torch.linspace(0, 2 * torch.pi, 9)[:-1].tolist() if rotary else [0.0]

    def loss(w: HeadWeights) -> tuple[float, float]:
        off = sum(float((scores(w, x, basis, a) - scores(weights, x, basis, a)).square().sum()) for a in angles)
        value = [(x @ one.value.repeat_interleave(one.share, 0).mT) @ one.out for one in (weights, w)]
        return off, float((value[0] - value[1]).square().sum())

    for found, bound in zip(loss(best), loss(mean), strict=True):
        assert found <= bound * (1 + 1e-6)


@given(seed=st.integers(0, 999), rank=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_subspace_is_the_optimum(seed, rank):
    """Eckart-Young: the loss is the sum of the smallest eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    z, reader = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 9))
    gram, readers = z.t() @ z, reader.t() @ reader
    encode, decode = subspace(gram, readers, rank)
    loss = float(((z - z @ (decode @ encode).t()) @ reader.t()).square().sum())
    singular = torch.linalg.svdvals(z @ reader.t())
    assert loss == pytest.approx(float(singular[rank:].square().sum()), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(encode @ encode.t(), torch.eye(rank, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_grouping_is_never_worse_than_neighbours(seed, groups):
    heads = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = similar(distances(heads), groups)
    assert order.sort()[0].tolist() == list(range(12))

    def pooling(rows: torch.Tensor) -> float:
        parts = rows.unflatten(0, (groups, -1))
        return float((parts - parts.mean(1, keepdim=True)).square().sum())

    assert pooling(heads[order]) <= pooling(heads) * (1 + 1e-9)


def test_procrustes_recovers_a_rotation():
    head, turn = torch.randn(5, 30, dtype=torch.float64), generated(3, 5)
    torch.testing.assert_close(turn_to(head, turn @ head), turn)
