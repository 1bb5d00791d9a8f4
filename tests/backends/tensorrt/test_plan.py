"""What goes into engines and what is left to PyTorch: reasons, files, and the numbers of all parts together."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from backends.tensorrt.test_engines import PARTLY, RECIPES, rewritten, steps
from families.configs import build
from torch import Tensor

import graphwright
from graphwright.artifact import read_manifest
from graphwright.backends.onnx import model
from graphwright.backends.onnx.naming import tensor_name
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.contract import Contract
from graphwright.errors import BackendError, TargetError
from graphwright.numerics import relative_error
from graphwright.partition import Part
from graphwright.program import Program
from graphwright.report.data import Report
from graphwright.target import local_gpu

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'graphwright[tensorrt]'"
)


class Twin:
    """A part on ONNX Runtime from the model that TensorRT reads, in place of its engine."""

    def __init__(self, contract: Contract, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._contract = contract

    def __call__(self, values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        from graphwright.backends.tensorrt.executable import part_outputs

        taken = {entry.name for entry in self._session.get_inputs()}
        given = {tensor_name(n): values[n].numpy() for n in self._contract.names if tensor_name(n) in taken}
        names = [entry.name for entry in self._session.get_outputs()]
        made = {n: torch.from_numpy(np.asarray(a)) for n, a in zip(names, self._session.run(names, given), strict=True)}
        return part_outputs(self._contract, values, made)


def torch_part(part: Part, file: Path):
    """A part that is left out, through its file."""
    from graphwright.backends.tensorrt.executable import TorchPart

    file.write_text(json.dumps(part.program.to_json()))
    return TorchPart(file, part.program.weights(), torch.device("cpu"))


def planned(program: Program, folder: Path, left: Mapping[str, str] | None = None):
    from graphwright.backends.tensorrt import plan
    from graphwright.backends.tensorrt.onnx_builder import OnnxBuilder

    answers = {node.name: OnnxBuilder().supports(node) for node in program.calls()}
    reasons = {name: answer.reason for name, answer in answers.items() if not answer.ok}
    return plan.plan(program, reasons | dict(left or {}), folder, OnnxBuilder())


def check_numbers(program: Program, found, folder: Path, limit: float) -> None:
    """Engines' parts on ONNX Runtime and the others in PyTorch, one after the other, against the program."""
    from graphwright.backends.tensorrt.executable import run_parts

    runners = [
        Twin(part.program.contract, found.models[part.nodes])
        if part.taken
        else torch_part(part, folder / f"{index}.json")
        for index, part in enumerate(found.parts)
    ]
    mine, theirs = (program.contract.allocate({"batch": 2, "capacity": 12}) for _ in range(2))
    for step in steps(program):
        taken = {name: tensor for name, tensor in step.items() if name in program.contract.names}
        (expected,) = program(**taken, **mine)
        made = run_parts(runners, {**taken, **theirs}, 0)
        assert relative_error(made["logits"], expected) < limit
    for spec in program.contract.state:
        assert relative_error(theirs[spec.name][:, :, :-1], mine[spec.name][:, :, :-1]) < limit


@needs_tensorrt
def test_weights_without_a_form_are_left_out_and_all_parts_compute_what_the_program_computes(tmp_path: Path) -> None:
    program = rewritten("llama", "nf4")
    found = planned(program, tmp_path)
    assert {reason for name, reason in found.left.items() if name.startswith("quantized_linear")} == {
        "TensorRT has no weights of format nf4"
    }
    assert sum(name.startswith("quantized_linear") for name in found.left) == 8
    assert [part.taken for part in found.parts].count(True) > 1
    check_numbers(program, found, tmp_path, 1e-4)


@needs_tensorrt
@pytest.mark.parametrize("family", ["gemma3", "mixtral", "bloom"])
def test_a_refusal_of_the_parser_cuts_the_program_there(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the parser took no attention of the second layer; names are those that it gives."""
    from graphwright.backends.tensorrt import onnx_builder

    program = rewritten(family, "fp32")
    second = [node.name for node in program.calls() if node.target is graphwright.ops.attention.target][1]
    asked = []

    def refused(path: Path) -> dict[str, str]:
        import onnx

        asked.append(path)
        names = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
        return {name: "no such attention" for name in names if name.startswith(f"{second}/Softmax")}

    monkeypatch.setattr(onnx_builder, "refused", refused)
    found = planned(program, tmp_path)
    assert found.left == {second: "TensorRT's parser: no such attention"}
    assert [part.taken for part in found.parts] == [True, False, True]
    assert len(asked) == 3  # the whole, and the two parts around the attention
    check_numbers(program, found, tmp_path, 1e-4)


@needs_tensorrt
def test_a_part_that_is_too_small_stays_out_with_the_reason(tmp_path: Path) -> None:
    program = rewritten("llama", "fp32")
    norms = [node for node in program.calls() if node.target is graphwright.ops.rms_norm.target]
    around = {n.name: "as if refused" for n in (*norms[1].all_input_nodes, *norms[1].users) if n.op == "call_function"}
    found = planned(program, tmp_path, around)
    assert "its part of 1 between nodes that stay out is too small" in found.left[norms[1].name]
    assert set(found.left) == {norms[1].name, *around}


@needs_tensorrt
def test_what_the_builder_refuses_is_left_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.backends.tensorrt import onnx_builder, plan
    from graphwright.backends.tensorrt.engine import BuildError
    from graphwright.target import Target

    program = rewritten("llama", "fp32")
    node = next(n.name for n in program.calls() if n.target is graphwright.ops.gated_activation.target)
    real, calls = onnx_builder.build, []

    def build_engine(path, profiles, arch, progress):
        calls.append(path)
        if len(calls) == 1:
            raise BuildError(f"Could not find any implementation for node {node}/Mul_17")
        return real(path, profiles, arch, progress)

    monkeypatch.setattr(onnx_builder, "build", build_engine)
    builder, target = onnx_builder.OnnxBuilder(), Target.parse("tensorrt:sm_89")
    facts = plan.build(program, {}, builder, target, tmp_path, lambda _text, _fraction: None)
    assert list(facts["left"]) == [node]
    assert facts["left"][node].startswith("TensorRT's builder: Could not find any implementation")
    assert [part["kind"] for part in facts["parts"]] == ["engine", "torch", "engine"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "sm_89.json", "sm_89.0.engine", "sm_89.1.graph.json", "sm_89.2.engine",
    }  # fmt: skip


@needs_tensorrt
def test_an_export_holds_engines_leftovers_and_plan(tmp_path: Path) -> None:
    out = graphwright.export(build("llama"), "tensorrt", tmp_path / "out", recipe={"passes": PARTLY["nf4"]})
    kernels = out / "kernels"
    facts = json.loads((kernels / "sm_89.json").read_text())
    engines = [part for part in facts["parts"] if part["kind"] == "engine"]
    left = [part for part in facts["parts"] if part["kind"] == "torch"]
    assert len(engines) >= 3
    assert len(left) >= 3
    for part in facts["parts"]:
        assert (kernels / part["file"]).stat().st_size > 0
        assert f"kernels/{part['file']}" in read_manifest(out).files
    report = Report.load(out / "report.json")
    assert report.coverage["left"] == facts["left"]
    assert report.coverage["fallbacks"]["quantized_linear"] == 8
    assert "All " + str(len(facts["left"])) + " nodes that stayed out" in (out / "report.html").read_text()
    if local_gpu() is None:
        with pytest.raises(TargetError, match="built for sm_89, and this machine has no GPU"):
            graphwright.load(out)


@needs_tensorrt
def test_what_is_wholly_taken_is_one_engine(tmp_path: Path) -> None:
    compiled = graphwright.compile(build("llama"), {"passes": RECIPES["int4"]}, "tensorrt:sm_120", verify=False)
    compiled.save(tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "kernels" / "sm_120.json").read_text())
    (part,) = facts["parts"]
    assert facts["left"] == {}
    assert part["quantized"]["INT4"] >= 8
    assert (tmp_path / "out" / "kernels" / part["file"]).stat().st_size > part["weight_bytes"]
    assert compiled.report.coverage["fallbacks"] == compiled.report.coverage["left"] == {}
    if local_gpu() is None:
        with pytest.raises(TargetError, match="no GPU"):
            compiled.generate([[1, 2, 3]], max_new_tokens=1)


@needs_tensorrt
def test_nothing_to_take_is_refused(tmp_path: Path) -> None:
    program = rewritten("llama", "fp32")
    everything = {node.name: "as if refused" for node in program.calls()}
    with pytest.raises(BackendError, match=r"takes no part of the program.*as if refused.*and \d+ more"):
        planned(program, tmp_path, everything)


@needs_tensorrt
@pytest.mark.skipif(local_gpu() is not None, reason="a machine without a GPU")
def test_verification_without_the_gpu_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no GPU"):
        graphwright.export("nowhere", "tensorrt", tmp_path / "out", verify=True)


def test_a_node_without_a_translation_is_named_by_the_export() -> None:
    from graphwright.backends.onnx.translate import RefusalError

    program = rewritten("llama", "nf4")
    with pytest.raises(RefusalError) as raised:
        model.build(program, OnnxOptions(profile="tensorrt"))
    assert raised.value.node.startswith(("quantized_linear", "quantized_embedding"))
