"""Every causal family as ONNX on ONNX Runtime: logits, caches and greedy tokens are the program's."""

from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from backends.onnx.running import CAUSAL, distance, exported, greedy, rewritten

from graphwright.backends.onnx.model import MODEL, unshaped

PADDED = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])
HOLE = torch.tensor([[1] * 9, [1, 1, 1, 0, 0, 0, 0, 1, 1]])
BOTH = {"llama", "gemma3", "deepseek_v3", "gpt_oss", "bloom"}
"""Families that are run in both opsets: what they are made of covers the others."""

FULL = torch.ones(1, 9, dtype=torch.int64)


@pytest.mark.parametrize("name", CAUSAL)
def test_standard_operators(name: str, tmp_path: Path) -> None:
    program = rewritten(name)
    for opset in (20, 24) if name in BOTH else (24,):
        session = exported(program, tmp_path, profile="standard", opset=opset)
        assert distance(program, session, PADDED, (6, 8, 9)) < 1e-4
        # With the shape inference of the checker, which refuses a shape that contradicts its own.
        onnx.checker.check_model(str(tmp_path / MODEL), full_check=True)
        assert unshaped(onnx_ir.load(tmp_path / MODEL)) == []
    assert distance(program, session, HOLE, (7, 8, 9)) < 1e-4


@pytest.mark.parametrize("name", CAUSAL)
def test_operators_of_onnx_runtime(name: str, tmp_path: Path) -> None:
    program = rewritten(name)
    if name in BOTH:
        assert distance(program, exported(program, tmp_path, profile="ort", opset=24), PADDED, (7, 8, 9)) < 1e-4
    session = exported(program, tmp_path, profile="ort", opset=20)
    assert unshaped(onnx_ir.load(tmp_path / MODEL)) == []
    assert distance(program, session, PADDED, (7, 8, 9)) < 1e-4
    assert distance(program, session, HOLE, (7, 8, 9)) < 1e-4
    # Grouped-query attention continues a prompt of several tokens for one sequence at a time only.
    assert distance(program, session, FULL, (4, 8, 9)) < 1e-4
    prompt = torch.arange(3, 14).tolist()
    assert session.greedy(prompt, 24)[0] == greedy(program, prompt, 24)
