"""Ahead of time through torch_tensorrt.dynamo: with a stand-in for the package, and for real where it can be imported.

The stand-in lowers nothing and builds no engine, but hands on the very graph that would be converted, which runs here
in the engine's place.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from backends.tensorrt.test_engines import steps
from backends.tensorrt.test_handover import layer, whole
from torch import Tensor

import graphwright
import graphwright.target
from graphwright import ops
from graphwright.artifact import read_manifest
from graphwright.backends.onnx.naming import tensor_name
from graphwright.backends.tensorrt import BACKEND, builder, executable, plan, torch_builder
from graphwright.backends.tensorrt import engine as engines
from graphwright.backends.tensorrt.no_gpu import questions_answered
from graphwright.capture import capture
from graphwright.contract import Contract
from graphwright.errors import BackendError, TargetError
from graphwright.numerics import relative_error
from graphwright.program import Program
from graphwright.report.data import Report
from graphwright.target import Target, local_gpu

SM_89 = Target.parse("tensorrt:sm_89")
MAKER = {"builder": "torch_tensorrt.dynamo 9.9", "library": "tensorrt_rtx", "library_version": "1.5"}


def silent(_text: str, _fraction: float) -> None:
    """Progress of no interest."""


class StandIn(ModuleType):
    """What `network` is where torch_tensorrt is, without its converters; `refused` and `failing` name operators."""

    NAME = MAKER["builder"]

    def __init__(self) -> None:
        super().__init__("graphwright.backends.tensorrt.network")
        self.refused: set[str] = set()
        self.failing: set[str] = set()
        self.asked: list[tuple[int, int]] = []
        self.profiles: list = []

    def lowered(self, archive: torch.export.ExportedProgram) -> torch.fx.GraphModule:
        self.asked.append(torch.cuda.get_device_capability())
        return archive.module(check_guards=False)

    def _named(self, module: torch.fx.GraphModule, names: set[str]) -> list[str]:
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        return [n.meta["custom"]["graphwright_node"] for n in calls if n.target.__name__ in names]

    def refusals(self, module: torch.fx.GraphModule) -> dict[str, str]:
        return dict.fromkeys(self._named(module, self.refused), "torch_tensorrt has no converter for it")

    def write(self, module: torch.fx.GraphModule, contract: Contract, outputs: tuple[str, ...]):
        for name in self._named(module, self.failing):
            raise engines.BuildError(f"{name}/Convert_0: unsupported shape")
        return SimpleNamespace(module=module, outputs=outputs, contract=contract), None

    def serialize(self, draft, profiles, arch: str, name: str, progress) -> engines.Engine:
        self.profiles.append(profiles)
        made = engines.Maker(name, MAKER["library"], MAKER["library_version"])
        outputs = tuple(engines.Tensor(tensor_name(n), "FLOAT", ()) for n in draft.outputs)
        inputs = tuple(engines.Tensor(tensor_name(n), "FLOAT", ()) for n in draft.contract.names)
        return engines.Engine(b"engine", arch, made, inputs, outputs, tuple(profiles), 6, {}, {})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """An environment with a CUDA build of PyTorch, torch-tensorrt-rtx, and no GPU."""
    network = StandIn()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    monkeypatch.setitem(sys.modules, network.__name__, network)
    monkeypatch.setattr(sys.modules["graphwright.backends.tensorrt"], "network", network, raising=False)
    converters = ModuleType("graphwright.backends.tensorrt.converters")
    monkeypatch.setitem(sys.modules, converters.__name__, converters)
    installed(monkeypatch, "torch-tensorrt-rtx")
    monkeypatch.setattr(torch_builder, "serialize", network.serialize)
    return network


def installed(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    """As if a distribution of torch_tensorrt lay beside a CUDA build of PyTorch."""
    real_spec, real_distribution = importlib.util.find_spec, importlib.metadata.distribution

    def found(name: str):
        if name.startswith("torch-tensorrt") and name != distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return object() if name == distribution else real_distribution(name)

    spec = SimpleNamespace(name="torch_tensorrt")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: spec if name == "torch_tensorrt" else real_spec(name, *rest)
    )
    monkeypatch.setattr(importlib.metadata, "distribution", found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


class Eager:
    """A part's engine, in whose place the graph runs that it would be made of."""

    def __init__(self, contract: Contract, model: torch_builder.Model) -> None:
        self._contract, self._model = contract, model

    def __call__(self, values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        made = self._model.module(*(values[name] for name in self._contract.names))
        return executable.part_outputs(
            self._contract, values, dict(zip(map(tensor_name, self._model.outputs), made, strict=True))
        )


def check_numbers(program: Program, found: plan.Plan) -> None:
    """All parts one after the other, over one prefill and two decode steps, against the program."""
    runners = [
        Eager(part.program.contract, found.models[part.nodes]) if part.taken else Left(part.program)
        for part in found.parts
    ]
    mine, theirs = (program.contract.allocate({"batch": 2, "capacity": 12}) for _ in range(2))
    for step in steps(program):
        (expected,) = program(**step, **mine)
        made = executable.run_parts(runners, {**step, **theirs}, 0)
        assert relative_error(made["logits"], expected) < 1e-4


class Left:
    """A part that is left to PyTorch."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self, values: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        contract = self._program.contract
        made = self._program(**{name: values[name] for name in contract.names})
        return dict(zip(contract.outputs, made, strict=True))


def test_an_artifact_says_who_built_its_engines(stand_in: StandIn, tmp_path: Path) -> None:
    program = layer("fp16-int8")
    compiled = graphwright.compile(program, {"passes": []}, "tensorrt:sm_89", verify=False)
    out = compiled.save(tmp_path / "out")
    facts = json.loads((out / "kernels" / "sm_89.json").read_text())
    (part,) = facts["parts"]
    assert facts["maker"] == MAKER
    assert facts["left"] == {}
    # The network's I/O is what the executable binds for engines of either builder.
    assert [entry["name"] for entry in part["inputs"]] == [tensor_name(name) for name in program.contract.names]
    assert [entry["name"] for entry in part["outputs"]] == [
        "logits", "key_cache_0.new", "key_cache_0.slots", "value_cache_0.new", "value_cache_0.slots",
    ]  # fmt: skip
    (profiles,) = stand_in.profiles
    assert [sizes["sequence"] for sizes in profiles] == [(1, 1, 1), (1, 512, 512)]  # decode and prefill
    assert stand_in.asked == ([(8, 9)] if local_gpu() is None else stand_in.asked)
    by = "torch_tensorrt.dynamo 9.9, tensorrt_rtx 1.5"
    assert read_manifest(out).builder == by
    assert BACKEND.kernels(out / "kernels")[0]["built by"] == by
    assert Report.load(out / "report.json").coverage["builder"] == by
    assert by in (out / "report.html").read_text()


def test_what_has_no_converter_is_left_out_and_all_parts_compute_the_program(stand_in: StandIn, tmp_path: Path) -> None:
    program = layer("fp32")
    stand_in.refused = {"silu.default"}
    chosen = builder.find(SM_89)
    assert all(chosen.supports(node).ok for node in program.calls())
    found = plan.plan(program, {}, tmp_path, chosen)
    (gate,) = (n.name for n in program.calls(ops.gated_activation.target))
    assert found.left == {gate: "torch_tensorrt has no converter for it"}
    assert [part.taken for part in found.parts] == [True, False, True]
    check_numbers(program, found)


def test_a_failed_conversion_leaves_its_node_out_with_the_reason(stand_in: StandIn, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8))
    program = capture(model, {"input": torch.randn(3, 8)})
    stand_in.failing = {"silu.default"}
    facts = plan.build(program, {}, builder.find(SM_89), SM_89, tmp_path, silent)
    ((name, reason),) = facts["left"].items()
    assert name.startswith("silu")
    assert "unsupported shape" in reason
    assert [part["kind"] for part in facts["parts"]] == ["engine", "torch", "engine"]


def test_weights_without_a_form_and_writes_in_place_are_refused_before_export(stand_in: StandIn) -> None:
    chosen = builder.find(SM_89)
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    product = graph.call_function(ops.quantized_linear.target, (given, given, given, None, None, "nf4", 32))
    assert chosen.supports(product).reason == "TensorRT has no weights of format nf4"
    assert (
        "writes into its arguments"
        in chosen.supports(graph.call_function(torch.ops.aten.add_.Tensor, (given, given))).reason
    )


def test_what_cannot_be_exported_is_no_silent_fallback(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(*_arguments):
        raise ValueError("a size depends on data")

    monkeypatch.setattr(torch_builder.Handover, "exported", exported)
    with pytest.raises(
        BackendError, match=r"torch_tensorrt: a size depends on data.*Or install graphwright\[tensorrt\]"
    ):
        builder.find(SM_89).prepare(whole(layer("fp32")), tmp_path)


# Which builder, and what is missing


def test_without_the_package_the_parser_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(builder, "has_torch_tensorrt", lambda: False)
    assert builder.find(SM_89).name.startswith("TensorRT's ONNX parser")


def test_a_build_of_pytorch_without_cuda_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match=r"CUDA build of PyTorch only.*Or install graphwright\[tensorrt\]"):
        graphwright.compile("nowhere", "fp32", "tensorrt:sm_89")  # before the model is looked for


@pytest.mark.parametrize("here", [None, "cuda:sm_80", "cuda:sm_89"])
def test_the_distribution_that_needs_the_gpu_says_so(
    here: str | None, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "torch-tensorrt")
    monkeypatch.setattr(torch_builder, "local_gpu", lambda: here)
    if here == "cuda:sm_89":
        builder.require(SM_89)
        return
    found = "this machine has no GPU" if here is None else "this machine's GPU is cuda:sm_80"
    with pytest.raises(TargetError, match=rf"sm_89 is asked for, and {found}.*Install torch-tensorrt-rtx instead"):
        graphwright.compile("nowhere", "fp32", "tensorrt:sm_89")


def test_a_package_that_cannot_be_imported_is_explained(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *rest: str) -> ModuleType:
        if name == "torch_tensorrt":
            raise OSError("libtorchtrt.so: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackendError, match=r"cannot be imported: libtorchtrt.*Or install graphwright\[tensorrt\]"):
        builder.find(SM_89)


def test_questions_are_answered_only_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.get_device_capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KeyError), questions_answered("sm_120"):
        assert torch.cuda.get_device_capability() == (12, 0)
        assert torch.cuda.current_device() == 0
        raise KeyError
    assert torch.cuda.get_device_capability is before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with questions_answered("sm_120"):
        assert torch.cuda.get_device_capability is before


def test_engines_are_loaded_by_the_library_that_built_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {**MAKER, "library": "tensorrt"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        BackendError, match=r"built by torch_tensorrt.dynamo 9.9, tensorrt 1.5.*graphwright\[torch-tensorrt\]"
    ):
        executable.require_library({"maker": made})
    assert executable.maker({"parts": []}).library == "tensorrt_rtx"  # an artifact of when there was one way


def test_an_engine_that_does_not_load_names_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _data: None)
    library = ModuleType("tensorrt_rtx")
    library.__version__ = "1.7"
    library.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    library.Runtime = lambda _log: runtime
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    (tmp_path / "sm_89.0.engine").write_bytes(b"engine")
    contract = Contract((), ())
    part = executable.EnginePart(
        {"contract": contract.to_json()}, engines.Maker(**MAKER), tmp_path / "sm_89.0.engine", torch.device("cpu")
    )
    with pytest.raises(BackendError, match=r"tensorrt_rtx 1.7 does not load.*built by .*tensorrt_rtx 1.5.*Install"):
        part({}, 0)


# Where the package is there


@pytest.fixture
def real():
    """torch_tensorrt itself, on a machine with or without a GPU."""
    with questions_answered("sm_89"):
        pytest.importorskip("torch_tensorrt", exc_type=Exception)
    if torch.version.cuda is None:
        pytest.skip("a CUDA build of PyTorch")


@pytest.mark.parametrize(("recipe", "codes"), [("fp32", {}), ("fp16-int8", {"INT8": 6})])
@pytest.mark.parametrize("arch", ["sm_89", "sm_120"])
def test_torch_tensorrt_builds_engines(real, recipe: str, codes: dict[str, int], arch: str, tmp_path: Path) -> None:
    program, target = layer(recipe), Target.parse(f"tensorrt:{arch}")
    if not torch_builder.builds_for_any_gpu() and target.gpu != local_gpu():
        pytest.skip("torch-tensorrt builds for the GPU at hand")
    facts = plan.build(program, {}, builder.find(target), target, tmp_path, silent)
    (part,) = facts["parts"]
    assert facts["left"] == {}
    assert facts["maker"]["builder"].startswith("torch_tensorrt.dynamo 2.")
    assert part["quantized"] == codes
    assert [entry["name"] for entry in part["inputs"]] == [tensor_name(name) for name in program.contract.names]
    entries = {entry["name"]: entry["dtype"] for entry in part["outputs"]}
    assert list(entries)[1:] == ["key_cache_0.new", "key_cache_0.slots", "value_cache_0.new", "value_cache_0.slots"]
    assert entries["key_cache_0.slots"] == "INT64"
    assert len(part["profiles"]) == 2
    assert (tmp_path / part["file"]).stat().st_size > part["weight_bytes"] > 0
    if codes:
        products = {node.name for node in program.calls(ops.quantized_linear.target)}
        assert products == {n.partition("/")[0] for n in part["dequantized"] if n.startswith("quantized_linear")}
        assert part["layers"]["ATTENTION_INPUT"] == 1
