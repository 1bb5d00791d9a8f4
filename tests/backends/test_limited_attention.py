"""Windows with anchors and blocks, shifted positions and merged heads, lowered by TVM and exported to ONNX.

What Inductor makes of them is tested by the samples of the op (test_inductor_lowerings)."""

from pathlib import Path

import pytest
import torch
from backends.onnx.running import distance, exported
from passes.quantize.quantizing import batches, run

from graphwright.backend import coverage
from graphwright.backends.tvm import BACKEND as TVM
from graphwright.program import Program
from graphwright.target import Target

CPU = Target.parse("cpu")

CHANGED = {
    "sinks": {"attention_sinks": {"window": 5, "sinks": 2}},
    "shifted": {"attention_sinks": {"window": 5, "sinks": 2, "shift": True}},
    "blocks": {"block_sparse": {"block": 4, "local": 1}},
    "one kv head": {"gqa_mean": {"groups": 1}},
    "dynamic rope": {"dynamic_ntk": {"factor": 2}},
}

SIZES = (
    {"batch": 1, "sequence": 1, "keys": 1, "capacity": 32, "logits": 1},
    {"batch": 2, "sequence": 19, "keys": 23, "capacity": 32, "logits": 2},
)


def rewritten(change: str, *passes) -> Program:
    return run([CHANGED[change], "merge_linear", *passes], "llama", calibration=batches(1, 24))[1]


def apart(executable, program: Program, sizes: dict[str, int]) -> float:
    inputs = program.contract.draw(sizes, 0)
    states = [program.contract.allocate(sizes) for _ in range(2)]
    (found,), (expected,) = executable({**inputs, **states[0]}), program(**inputs, **states[1])
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("change", CHANGED)
def test_tvm(change: str, tmp_path: Path) -> None:
    program = rewritten(change, "static_cache", "select_logits")
    assert not coverage(program, TVM, CPU).fallbacks
    prepared = TVM.prepare(program, CPU)
    executable = TVM.compile(prepared, CPU, tmp_path, lambda _text, _fraction: None)
    assert all(apart(executable, prepared, sizes) < 1e-5 for sizes in SIZES)


@pytest.mark.parametrize(("profile", "opset"), [("standard", 24), ("ort", 20)])
@pytest.mark.parametrize("change", CHANGED)
def test_onnx(change: str, profile: str, opset: int, tmp_path: Path) -> None:
    program = rewritten(change, "explicit_cache")
    session = exported(program, tmp_path, profile=profile, opset=opset)
    # Grouped-query attention of ONNX Runtime continues one sequence at a time.
    padded = [[1] * 19, [0] * 3 + [1] * 16] if profile == "standard" else [[1] * 19]
    assert distance(program, session, torch.tensor(padded), (15, 18, 19)) < 1e-4
