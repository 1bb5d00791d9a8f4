"""Kernels of mixtures of experts against the eager ops."""

import pytest
import torch
from kernels.tir.running import nowhere, run, size

from graphwright.backends.tvm.expert_layout import tiled_stack
from graphwright.kernels.tir.experts import (
    SHARES,
    Limit,
    Routing,
    choose_tokens,
    columns_together,
    combine,
    expert_linear,
    limit_choices,
    route,
    sort_choices,
)
from graphwright.kernels.tir.linear import Linear
from graphwright.numerics import relative_error
from graphwright.ops import expert_capacity, expert_choice, experts, moe_routing, quantized_experts
from graphwright.ops.expert_capacity import ratio
from graphwright.ops.experts import CLAMPED_SWIGLU
from graphwright.rounding import quantize
from graphwright.scheme import Scheme


@pytest.mark.parametrize(
    ("count", "top_k", "scoring", "normalize", "groups", "top_groups", "corrected"),
    [
        (5, 2, "softmax", False, 1, 1, False),
        (8, 1, "sigmoid", True, 1, 1, False),
        (64, 8, "softmax", True, 1, 1, False),
        (12, 3, "softmax", False, 4, 2, False),
        (16, 4, "sigmoid", True, 4, 2, True),
        (8, 2, "sigmoid", True, 8, 3, True),
    ],
)
def test_routing_equals_the_op(count, top_k, scoring, normalize, groups, top_groups, corrected):
    torch.manual_seed(0)
    bias = torch.randn(count) * 0.1 if corrected else None
    for rows in (1, 7, 33):
        logits = torch.randn(rows, count)
        given = (top_k, scoring, normalize, 1.5, groups, top_groups)
        weights, indices = nowhere(rows, top_k), torch.zeros(rows, top_k, dtype=torch.int64)
        kernel = route(Routing(count, *given, corrected), size("rows"))
        run(kernel, logits, *([] if bias is None else [bias]), weights, indices)
        expected, chosen = moe_routing(logits, bias, *given)
        assert torch.equal(indices, chosen)
        assert relative_error(weights, expected) < 1e-6


@pytest.mark.parametrize("top_k", [1, 3])
def test_merged_removed_skipped_and_shared_experts(top_k):
    torch.manual_seed(0)
    stored = torch.tensor([0, 1, -1, 1, 2, 3])
    for rows in (1, 9):
        logits, gate, bias = torch.randn(rows, 6), torch.rand(rows, 1), torch.randn(6) * 0.1
        given = (top_k, "softmax", True, 1.5, 1, 1)
        routing = Routing(6, *given, True, True, 0.6, 2, 4, True)
        weights, indices = nowhere(rows, top_k + 2), torch.zeros(rows, top_k + 2, dtype=torch.int64)
        run(route(routing, size("rows")), logits, bias, stored, gate, weights, indices)
        expected, chosen = moe_routing(logits, bias, *given, stored, 0.6, 2, 4, gate)
        assert torch.equal(indices, chosen)
        assert relative_error(weights, expected) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (17, 2), (3, 11, 2)])
@pytest.mark.parametrize("limit", [(2, 0.0, True), (0, 1.25, True), (0, 0.7, False)])
def test_capacity_equals_the_op(shape, limit):
    torch.manual_seed(0)
    weights, indices = torch.rand(shape), torch.randint(-1, 4, shape)
    names = [size(f"size_{place}") for place in range(len(shape) - 1)]
    kept, chosen, dropped = nowhere(*shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    described = Limit(4, limit[0], ratio(limit[1]), limit[2])
    run(limit_choices([*names, shape[-1]], described), weights, indices, kept, chosen, dropped)
    for found, expected in zip((kept, chosen, dropped), expert_capacity(weights, indices, 4, *limit), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 3), (17, 4), (2, 11, 5)])
@pytest.mark.parametrize("limit", [(3, 0.0, True), (0, 2.0, True)])
def test_expert_choice_equals_the_op(shape, limit):
    torch.manual_seed(0)
    logits = torch.randn(shape)
    names = [size(f"size_{place}") for place in range(len(shape) - 1)]
    weights, indices, scores = nowhere(*shape), torch.zeros(shape, dtype=torch.int64), nowhere(*shape)
    described = Limit(shape[-1], limit[0], ratio(limit[1]), limit[2])
    run(choose_tokens([*names, shape[-1]], described), logits, weights, indices, scores)
    expected, chosen = expert_choice(logits, *limit)
    assert torch.equal(indices, chosen)
    assert relative_error(weights, expected) < 1e-6


def test_choices_are_sorted_and_idle_experts_left_out():
    indices = torch.tensor([[4, 0], [4, 2], [0, 4]])
    order, starts, active = (torch.zeros(n, dtype=torch.int32) for n in (6, 7, 7))
    run(sort_choices(size("tokens"), 2, size("choices"), 6), indices, order, starts, active)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert starts.tolist() == [0, 2, 2, 3, 3, 6, 6]
    assert active[:4].tolist() == [3, 0, 2, 4]


@pytest.mark.parametrize("columns", [1, 7, 8, 16, 24, 23, 96])
def test_columns_that_follow_each_other_leave_a_share_for_every_thread(columns):
    together = columns_together(columns)
    assert columns % together == 0
    assert columns // together >= min(columns, SHARES)
    assert columns not in (16, 24, 96) or together == columns // SHARES


CASES = [
    # experts, width, inner, outputs, activation, gated, biases, format, group
    (6, 24, 256, 24, "silu", True, False, "float32", 0),
    (3, 20, 18, 37, "gelu_tanh", True, True, "float32", 0),
    (4, 40, 24, 40, "relu", False, True, "float32", 0),
    (5, 32, 48, 33, CLAMPED_SWIGLU, True, True, "float32", 0),
    (6, 64, 48, 64, "silu", True, False, "int8", 16),
    (4, 70, 40, 40, "silu", True, True, "int4", 32),
]


def mixture(case: tuple, rows: int, lanes: int) -> float:
    """Relative error of the kernels against the op."""
    count, width, inner, outputs, activation, gated, biased, format, group = case
    up, down = torch.randn(count, inner * (2 if gated else 1), width), torch.randn(count, outputs, inner)
    up_bias, down_bias = (torch.randn(count, w.shape[1]) if biased else None for w in (up, down))
    x, top_k = torch.randn(rows, width), 2
    indices = torch.rand(rows, count).argsort(-1)[:, :top_k].contiguous()
    # The last expert is chosen by every token, and has more rows than a block.
    indices[:, 1] = torch.where(indices[:, 0] == count - 1, 0, count - 1)
    indices[2::3, 0] = -1  # dropped
    shares = torch.rand(rows, top_k)
    rest = (activation, gated, 1.7, 0.5)
    if format == "float32":
        expected = experts(x, shares, indices, up, up_bias, down, down_bias, *rest)
        parts = [(up, None, None, width), (down, None, None, inner)]
    else:
        scheme = Scheme(format=format, group_size=group)
        groups = [scheme.group(width), scheme.group(inner)]
        made = [[quantize(one, scheme) for one in stack] for stack in (up, down)]
        stacks = [
            [torch.stack(part) for part in zip(*((q.packed, q.grid.scale, q.grid.zero_point) for q in s), strict=True)]
            for s in made
        ]
        biases = (up_bias, down_bias)
        given = [part for stack, bias in zip(stacks, biases, strict=True) for part in (*stack, bias)]
        expected = quantized_experts(x, shares, indices, *given, format, *groups, *rest)
        parts = [(*stack, size_) for stack, size_ in zip(stacks, groups, strict=True)]
    tiled = [
        tiled_stack(*part[:3], bias, format, part[3], parts=pieces)
        for part, bias, pieces in zip(parts, (up_bias, down_bias), (2 if gated else 1, 0), strict=True)
    ]
    padded = tiled[0].rows // 2 if gated else tiled[0].rows
    coded = (format != "float32", "float16" if format != "float32" else "")
    first = Linear(tiled[0].rows, width, format, parts[0][3], *coded, biased, False, activation, 0, *rest[1:])
    second = Linear(tiled[1].rows, inner, format, parts[1][3], *coded, biased)
    choices = rows * top_k
    order, starts, active = (torch.zeros(n, dtype=torch.int32) for n in (choices, count + 1, count + 1))
    run(sort_choices(size("tokens"), top_k, size("choices"), count), indices, order, starts, active)
    plan, middle, outer = (order, starts, active), nowhere(choices, padded), nowhere(choices, outputs)
    up_kernel = expert_linear(first, count, (size("tokens"), width), size("choices"), top_k, lanes)
    run(up_kernel, x, *tiled[0].tensors, *plan, *tiled[0].bias, middle)
    same = size("choices")
    down_kernel = expert_linear(second, count, (same, padded), same, 0, lanes)
    run(down_kernel, middle, *tiled[1].tensors, *plan, *tiled[1].bias, outer)
    out = nowhere(rows, outputs)
    run(combine(size("tokens"), size("choices"), top_k, outputs), outer, shares, indices, out)
    return relative_error(out, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_equal_the_op(case):
    torch.manual_seed(0)
    for rows in (1, 5, 40):
        assert mixture(case, rows, 16) < 3e-6


@pytest.mark.parametrize("lanes", [4, 8])
def test_narrower_vectors_equal_the_op(lanes):
    torch.manual_seed(0)
    for case in (CASES[1], CASES[5]):
        assert mixture(case, 9, lanes) < 3e-6
