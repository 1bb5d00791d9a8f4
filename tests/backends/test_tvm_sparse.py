"""Programs with 2:4 weights go wholly to TVM and equal the eager program; other layouts are passed over by name."""

import pytest
from backends.test_tvm_families import distance, lowered, rewritten

from graphwright.backend import coverage
from graphwright.backends.tvm import BACKEND
from graphwright.backends.tvm.layout import tiled_sparse_linear
from graphwright.ops import sparse_linear
from graphwright.target import Target

CPU = Target.parse("cpu")
PLAIN = ["merge_linear", "static_cache", "select_logits"]
HALVED = {"magnitude": {"pattern": "2:4"}}
INT4 = {"rtn": {"bits": 4, "group_size": 32}}
INT8 = {"rtn": {"bits": 8, "group_size": 32, "symmetric": True}}
RECIPES = {
    "float32": [HALVED],
    "int4": [HALVED, INT4],
    "int8 and rounded activations": [HALVED, INT8, "activations"],
}


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", "float32"), ("llama", "int4"), ("llama", "int8 and rounded activations")]
)
def test_halved_weights_equal_the_eager_program(name, kind, tmp_path):
    program = rewritten(name, {"passes": [*PLAIN, *RECIPES[kind], "compress_sparse"]})
    layers = list(program.calls(sparse_linear.target))
    assert len(layers) >= 8
    assert not coverage(program, BACKEND, CPU).fallbacks
    executable, program = lowered(program, tmp_path)
    assert len(list(program.calls(tiled_sparse_linear.target))) == len(layers)
    for sizes in (
        {"batch": 1, "sequence": 1, "keys": 1, "capacity": 16, "logits": 1},
        {"batch": 2, "sequence": 9, "keys": 11, "capacity": 16, "logits": 2},
    ):
        # A small difference may round an activation to the next code.
        assert distance(executable, program, sizes) < (0.02 if "rounded" in kind else 1e-5)


def test_other_layouts_are_passed_over_with_the_reason():
    program = rewritten("llama", {"passes": [*PLAIN, "magnitude", "compress_sparse"]})
    reasons = {BACKEND.supports(node, CPU).reason for node in program.calls(sparse_linear.target)}
    assert reasons == {"no kernel for sparse weights of layout 1x1, only for 2:4"}
    assert "sparse_linear" in str(coverage(program, BACKEND, CPU).fallbacks)


def test_a_program_with_parts_cut_out_is_lowered_like_any_other(tmp_path):
    cuts = [{"prune_heads": {"ratio": 0.25, "score": "magnitude"}}, {"prune_channels": {"score": "magnitude"}}]
    program = rewritten("falcon", {"passes": [*PLAIN, *cuts, INT8]})
    assert {record.name for record in program.history} >= {"prune_heads", "prune_channels"}
    assert not coverage(program, BACKEND, CPU).fallbacks
    executable, program = lowered(program, tmp_path)
    for sizes in (
        {"batch": 1, "sequence": 1, "keys": 1, "capacity": 16, "logits": 1},
        {"batch": 2, "sequence": 9, "keys": 11, "capacity": 16, "logits": 2},
    ):
        assert distance(executable, program, sizes) < 1e-5
