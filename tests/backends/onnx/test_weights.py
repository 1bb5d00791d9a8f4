"""Low-bit weights as ONNX: the numbers of the quantized program, in the operators that the profile promises."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from backends.onnx.running import DECOMPOSED, WEIGHTS, distance, exported, greedy, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright import packing
from graphwright.backends.onnx.model import MODEL, build, unshaped
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.ort import block_size, blocked
from graphwright.backends.onnx.translate import RefusalError

PADDED = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])


def operators(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(directory / MODEL, load_external_data=False).graph.node)


@pytest.mark.parametrize("opset", [20, 24])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("profile", ["ort", "standard"])
def test_numbers_are_the_programs(weights: str, profile: str, opset: int, tmp_path: Path) -> None:
    program = rewritten("llama", weights)
    session = exported(program, tmp_path, profile=profile, opset=opset, wide_codes=True)
    # A last bit that differs may round one activation to the next code.
    limit = 2e-2 if weights == "int8-dynamic" or weights.startswith("fp8") else 1e-4
    assert distance(program, session, PADDED, (7, 8, 9)) < limit


@pytest.mark.parametrize("weights", DECOMPOSED)
def test_other_formats_are_refused_or_decomposed(weights: str, tmp_path: Path) -> None:
    program = rewritten("llama", weights)
    for profile in ("ort", "standard", "tensorrt"):
        if weights == "fp8-e4m3" and profile == "tensorrt":
            continue
        with pytest.raises(RefusalError, match="decompose=true") as raised:
            build(program, OnnxOptions(profile=profile))
        assert raised.value.node.startswith(("quantized_linear", "sparse_linear", "spqr_linear"))
    for profile, opset in (("ort", 20), ("standard", 24)):
        session = exported(program, tmp_path, profile=profile, opset=opset, decompose=True)
        assert distance(program, session, PADDED, (7, 8, 9)) < 1e-4
    assert unshaped(build(program, OnnxOptions(profile="standard", decompose=True))) == []


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bloom", "gpt_oss"])
def test_families_with_low_bit_weights(name: str, weights: str, tmp_path: Path) -> None:
    program = rewritten(name, weights)
    session = exported(program, tmp_path)
    assert distance(program, session, PADDED, (7, 8, 9)) < 1e-4
    assert session.greedy([5, 6, 7], 16)[0] == greedy(program, [5, 6, 7], 16)


def test_ort_multiplies_4_bit_codes(tmp_path: Path) -> None:
    exported(rewritten("llama", "int4"), tmp_path)
    found = operators(tmp_path)
    assert found["MatMulNBits"] == 8  # four in each of two layers
    assert (
        found["DequantizeLinear"] == found["Gemm"] == 1
    )  # the head of 8 bits, whose operator ONNX Runtime runs slowly
    assert found["GatherBlockQuantized"] == 1
    assert found["GroupQueryAttention"] == 2
    assert found["RotaryEmbedding"] == 4
    assert not found["MatMul"] + found["Softmax"]


def test_8_bit_products_round_activations_only_when_asked(tmp_path: Path) -> None:
    exported(rewritten("llama", "int8"), tmp_path, integer_products=True)
    assert operators(tmp_path)["MatMulNBits"] == 9


@pytest.mark.parametrize("opset", [20, 24])
def test_standard_uses_no_other_domain(opset: int, tmp_path: Path) -> None:
    exported(rewritten("llama", "int8"), tmp_path, profile="standard", opset=opset)
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert operators(tmp_path)["DequantizeLinear"] == 9


def test_four_bit_codes_take_four_bits(tmp_path: Path) -> None:
    exported(rewritten("llama", "int4"), tmp_path, profile="standard", opset=24)
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("_codes"))
    assert kinds[onnx.TensorProto.UINT4] == 8


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_every_value_has_a_shape(name: str, profile: str) -> None:
    assert unshaped(build(rewritten(name), OnnxOptions(profile=profile))) == []


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int4", "int8"]), st.integers(1, 5), st.integers(1, 70), st.sampled_from([16, 32, 48, 0]),
    st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
def test_blocks_stand_for_the_same_weights(
    format: str, outputs: int, features: int, group: int, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    group_size = group or features + features % 2
    groups = -(-features // group_size)
    kind = packing.FORMATS[format]
    codes = torch.randint(kind.low, kind.high + 1, (outputs, groups * group_size), generator=generator)
    weight = packing.pack(codes, format, group_size)
    scale = torch.rand(outputs, groups, generator=generator)
    zero = None
    if not symmetric:
        zero = torch.randint(kind.low, kind.high + 1, (outputs, groups), generator=generator).to(kind.storage)
    expected = packing.dequantize(weight, scale, zero, format, group_size)[:, :features]
    found, scales, points, block = blocked(weight, scale, zero, format, group_size, features)
    assert block == block_size(groups, group_size)
    dense = ((found.float() - points.float()[..., None]) * scales[..., None]).flatten(1)[:, :features]
    assert torch.equal(dense, expected)
