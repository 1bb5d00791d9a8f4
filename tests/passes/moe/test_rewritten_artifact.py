"""Rewritten mixtures go wholly to the CPU's kernels, and those compute what the graph says."""

import pytest
import torch
from passes.moe.mixture import COUNT, INNER, Mixture, rows

import graphwright
from graphwright.numerics import relative_error

CASES = {
    "pruned and merged": ((2, "softmax", True), [{"prune_experts": {"ratio": 0.2}}, {"merge_experts": {"ratio": 0.3}}]),
    "groups pruned": ((2, "sigmoid", False, 1.5, 3, 2), [{"prune_experts": {"ratio": 0.3}}]),
    "skipped, capacity": (
        (3, "softmax", True),
        [{"fewer_active_experts": {"skip_ratio": 0.6}}, {"capacity": {"factor": 0.8}}],
    ),
    "expert choice": ((2, "softmax", False, 1.5), [{"expert_choice": {"factor": 1.5}}]),
    "shared, int4": ((2, "softmax", True), ["fuse_shared_experts", {"rtn": {"bits": 4, "group_size": 8}}]),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_what_the_graph_says(case):
    routing, passes = CASES[case]
    shared = {"shared": INNER + 4, "weighed": True} if "shared" in case else {}
    module = Mixture(*routing, **shared).eval()
    compiled = graphwright.compile(
        module,
        {"passes": passes},
        example_inputs={"x": rows(7)},
        dims={"x": {0: "sequence"}},
        calibration=[{"x": rows(40, 5)}],
    )
    assert compiled.backend == "tvm", compiled.report.coverage["passed_over"]
    assert not compiled.report.coverage["fallbacks"]
    for count in (1, 3, 5 * COUNT + 1):
        x = rows(count, 9)
        assert relative_error(compiled(x=x)[0], compiled.program(x=x)[0]) < 1e-5
    assert torch.isfinite(compiled(x=rows(2))[0]).all()
