"""Engines built without a GPU: I/O, quantized weights, refusals; and the ONNX they are built from, on ONNX Runtime."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from backends.onnx.running import CAUSAL
from families.cache import captured

import graphwright
from graphwright import ops
from graphwright.backends.onnx import model
from graphwright.backends.onnx.naming import tensor_name
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.errors import BackendError, TargetError
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import relative_error
from graphwright.ops import kv_cache_update
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target, local_gpu

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'graphwright[tensorrt]'"
)

CACHED = ["merge_linear", "static_cache", "select_logits"]
HALF = {"cast": {"dtype": "float16"}}
ROW = {"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}
RECIPES = {
    "fp32": CACHED,
    "fp16": [HALF, *CACHED],
    "int8": [*CACHED, ROW],
    "int8-dynamic": [*CACHED, ROW, "activations"],
    "int4": [*CACHED, {"rtn": {"bits": 4, "group_size": 32}}],
    "int4-fp16": [HALF, *CACHED, {"rtn": {"bits": 4, "group_size": 16, "symmetric": True}}],
    "fp8": [*CACHED, {"fp8": {"scale_dtype": "float32"}}, {"activations": {"format": "fp8_e4m3"}}],
}

PARTLY = {"nf4": [*CACHED, {"nf4": {"group_size": 32}}]}
"""Recipes of whose programs engines take a part."""


@functools.cache
def rewritten(family: str, recipe: str) -> Program:
    _, program = captured(family)
    passes = plan_passes(Recipe.load({"passes": (RECIPES | PARTLY)[recipe]}), program)
    return PassManager(Context(Target.parse("cpu")), verify=False).run(program, passes)


@functools.cache
def engine(family: str, recipe: str, arch: str = "sm_89", profiles: int = 2):
    import tempfile

    from graphwright.backends.tensorrt.engine import ranges
    from graphwright.backends.tensorrt.onnx_builder import build as build_engine
    from graphwright.backends.tensorrt.onnx_builder import refused

    program = rewritten(family, recipe)
    with tempfile.TemporaryDirectory() as folder:
        model.save(model.build(program, OnnxOptions(profile="tensorrt")), Path(folder))
        assert refused(Path(folder) / model.MODEL) == {}
        sizes = ranges(program.contract)[-profiles:]
        return build_engine(Path(folder) / model.MODEL, sizes, arch, lambda _text, _fraction: None)


def twin(program: Program, folder: Path):
    """The ONNX that TensorRT reads, as a function on ONNX Runtime with the program's own contract."""
    import onnxruntime

    model.save(model.build(program, OnnxOptions(profile="tensorrt")), folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # ONNX Runtime's own fusions would round activations to 8 bits in front of dequantized weights.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / model.MODEL), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]

    def call(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        taken = {entry.name for entry in session.get_inputs()}
        given = {tensor_name(n): t.numpy() for n, t in tensors.items() if tensor_name(n) in taken}
        made = dict(zip(names, session.run(names, given), strict=True))
        for spec in program.contract.state:
            new, slots = (torch.from_numpy(np.asarray(made[f"{spec.name}.{part}"])) for part in ("new", "slots"))
            kv_cache_update(tensors[spec.name], new, slots)
        return [torch.from_numpy(made[tensor_name(name)]) for name in program.contract.outputs]

    return call


def steps(program: Program):
    """A ragged prefill and two decode steps of two sequences."""
    generator = torch.Generator().manual_seed(3)
    lengths, longest = torch.tensor([6, 4]), 6
    ids = torch.randint(3, 60, (2, longest), generator=generator)
    places = torch.where(torch.arange(longest) < lengths[:, None], torch.arange(longest), -1)
    for number in range(3):
        index = torch.zeros(2, 1, dtype=torch.int64) if number else (lengths - 1)[:, None]
        keys = torch.arange(longest + number)
        yield {"input_ids": ids, "positions": places, "key_positions": keys, "logit_index": index}
        ids = torch.randint(3, 60, (2, 1), generator=generator)
        places = lengths[:, None] + number


@pytest.mark.parametrize(("family", "recipe"), [*((f, "fp32") for f in CAUSAL), *(("llama", r) for r in RECIPES)])
def test_what_tensorrt_reads_computes_what_the_program_computes(family: str, recipe: str, tmp_path: Path) -> None:
    program = rewritten(family, recipe)
    call = twin(program, tmp_path)
    mine, theirs = (program.contract.allocate({"batch": 2, "capacity": 12}) for _ in range(2))
    limit = {"fp32": 1e-4, "int8": 1e-4, "int4": 2e-4}.get(recipe, 3e-2)
    errors = []
    for step in steps(program):
        taken = {name: tensor for name, tensor in step.items() if name in program.contract.names}
        (expected,) = program(**taken, **mine)
        (found,) = call({**taken, **theirs})
        errors += [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    if recipe in ("int8-dynamic", "fp8"):
        # Where an activation lies between two codes, a last bit decides; most sequences have no such activation.
        assert sorted(errors)[len(errors) // 2] < 1e-4
        assert max(errors) < 0.1
        return
    assert max(errors) < limit
    for spec in program.contract.state:
        assert relative_error(theirs[spec.name][:, :, :-1], mine[spec.name][:, :, :-1]) < limit


SLOW_TO_BUILD = {"deepseek_v2", "deepseek_v3", "gpt_oss", "qwen2_moe", "qwen3_moe"}
"""Mixtures, of which the prefill profile alone is built; mixtral is built with both."""


@needs_tensorrt
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_becomes_one_engine(family: str) -> None:
    profiles = 1 if family in SLOW_TO_BUILD else 2
    built = engine(family, "fp32", profiles=profiles)
    contract = rewritten(family, "fp32").contract
    assert [tensor.name for tensor in built.inputs] == [tensor_name(name) for name in contract.names]
    assert [tensor.name for tensor in built.outputs][:1] == ["logits"]
    updates = {f"{spec.name}.{part}" for spec in contract.state for part in ("new", "slots")}
    assert {tensor.name for tensor in built.outputs} == {"logits"} | updates
    assert len(built.data) > built.weight_bytes > 0
    longest = [1, min(4096, contract.dim("sequence").max)]
    assert [profile["sequence"][0] for profile in built.profiles] == [1] * profiles
    assert [profile["sequence"][2] for profile in built.profiles] == longest[-profiles:]


@needs_tensorrt
@pytest.mark.parametrize(
    ("recipe", "codes"),
    [("int8", "INT8"), ("int8-dynamic", "INT8"), ("int4", "INT4"), ("int4-fp16", "INT4"), ("fp8", "FP8")],
)
def test_quantized_weights_stay_quantized(recipe: str, codes: str) -> None:
    built = engine("llama", recipe)
    assert built.quantized[codes] >= 8  # four in each of two layers
    # The built engine's own layers dequantize every one of them: none was folded into a dense weight.
    program = rewritten("llama", recipe)
    layers = {node.name for node in program.calls(ops.quantized_linear.target)}
    assert layers == {name.partition("/")[0] for name in built.dequantized if name.startswith("quantized_linear")}
    weights = sum(t.numel() * t.element_size() for t in rewritten("llama", recipe).weights().values())
    dense = engine("llama", "fp32").weight_bytes
    # What the built engine holds on the device, as TensorRT counts it: the codes, and nothing dequantized beside them.
    assert built.weight_bytes < 1.25 * weights + 4096
    assert built.weight_bytes < 0.55 * dense
    assert engine("llama", "fp32").dequantized == ()


@needs_tensorrt
def test_half_precision_attention_is_tensorrts_own() -> None:
    assert engine("llama", "fp16").layers["ATTENTION_INPUT"] == 2
    assert "ATTENTION_INPUT" not in engine("llama", "fp32").layers


@needs_tensorrt
def test_a_refused_node_is_named(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    from graphwright.backends.tensorrt.onnx_builder import refused

    node = helper.make_node("StringNormalizer", ["x"], ["y"], name="odd/StringNormalizer_0")
    names = [helper.make_tensor_value_info(n, TensorProto.STRING, ["n"]) for n in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", names[:1], names[1:])), tmp_path / "odd.onnx")
    assert "odd/StringNormalizer_0" in refused(tmp_path / "odd.onnx")


def test_sizes_outside_of_the_profiles_are_named() -> None:
    from graphwright.backends.tensorrt.executable import choose_profile

    profiles = [{"sequence": (1, 1, 1), "batch": (1, 1, 64)}, {"sequence": (1, 512, 4096), "batch": (1, 1, 8)}]
    assert choose_profile(profiles, {"sequence": 1, "batch": 9}) == 0
    assert choose_profile(profiles, {"sequence": 2, "batch": 8}) == 1
    with pytest.raises(BackendError, match="batch is 9 and may be 1 to 8"):
        choose_profile(profiles, {"sequence": 2, "batch": 9})


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BackendError, match=r"needs the package tensorrt-rtx.*graphwright\[tensorrt\]"):
        graphwright.compile("nowhere", "fp32", "tensorrt:sm_89")  # before the model is looked for


def test_targets() -> None:
    assert Target.parse("tensorrt:sm_89").gpu == "cuda:sm_89"
    with pytest.raises(TargetError, match="Did you mean tensorrt:sm_89"):
        Target.parse("tensorrt:sm_88")
    if local_gpu() is None:
        with pytest.raises(TargetError, match="Name the architecture: tensorrt:sm_80"):
            Target.parse("tensorrt")
