"""torch.compile through torch_tensorrt: what is handed over, with a stand-in for the package, and errors without it.

The stand-in takes the exported program as the package would, and runs it eagerly. Where the package itself can be
imported, its own registry is asked about what is handed over.
"""

import importlib
import importlib.util
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch
from families.cache import captured
from families.configs import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

import graphwright.target
from graphwright import ops, packing
from graphwright.backend import region_coverage
from graphwright.backends.tensorrt import BACKEND, executable, jit
from graphwright.backends.tensorrt.handover import Handover
from graphwright.backends.tensorrt.no_gpu import questions_answered
from graphwright.capture import capture
from graphwright.dynamo import to_cpu
from graphwright.errors import BackendError
from graphwright.manager import PassManager, plan_passes
from graphwright.numerics import mean_kl, relative_error
from graphwright.op import op_of
from graphwright.pass_ import Context
from graphwright.recipe import Recipe
from graphwright.target import Target

HALF = {"cast": {"dtype": "float16"}}
ROW = {"rtn": {"bits": 8, "group_size": 0, "symmetric": True, "scale_dtype": "float32"}}
RECIPES = {
    "fp32": ["merge_linear"],
    "fp16": [HALF, "merge_linear"],
    "int8": ["merge_linear", ROW],
    "int8-dynamic": ["merge_linear", ROW, "activations"],
    "int4": ["merge_linear", {"rtn": {"bits": 4, "group_size": 32}}],
    "int4-fp16": [HALF, "merge_linear", {"rtn": {"bits": 4, "group_size": 16, "symmetric": True}}],
    "fp8": ["merge_linear", {"fp8": {"scale_dtype": "float32"}}, {"activations": {"format": "fp8_e4m3"}}],
    "nf4": ["merge_linear", {"nf4": {"group_size": 32}}],
}
KEPT = {
    "fp32": {},
    "fp16": {"attention": 2},
    "int8": {"quantized_linear": 9, "quantized_embedding": 1},
    "int8-dynamic": {"quantized_linear": 9, "quantized_embedding": 1, "quantize_dequantize": 9},
    "int4": {"quantized_linear": 9, "quantized_embedding": 1},
    "int4-fp16": {"quantized_linear": 9, "quantized_embedding": 1, "attention": 2},
    "fp8": {"quantized_linear": 9, "quantized_embedding": 1, "quantize_dequantize": 9},
    "nf4": {"quantized_linear": 9, "quantized_embedding": 1},
}
"""Ops of ours that are handed over as they are; all others have become ATen."""

MEASURED = {"int8-dynamic": 2e-2, "fp8": 2e-2, "fp16": 5e-3, "int4-fp16": 5e-3}
"""Limits where an activation between two codes, or half precision, decides the last bit."""


def rewritten(family: str, recipe: str):
    _, program = captured(family)
    passes = plan_passes(Recipe.load({"passes": RECIPES[recipe]}), program)
    return PassManager(Context(Target.parse("cpu")), verify=False).run(program, passes)


def padded(program, batch: int = 3, length: int = 7):
    """Drawn inputs whose last row is padded on the left, so that some queries see nothing."""
    tensors = program.contract.draw({"batch": batch, "sequence": length})
    if "attention_mask" in tensors:
        tensors["attention_mask"] = torch.ones_like(tensors["attention_mask"])
        tensors["attention_mask"][-1, :3] = 0
    return list(tensors.values())


@pytest.mark.parametrize(
    ("family", "recipe"),
    [*(("llama", name) for name in RECIPES), ("gemma3", "fp16"), ("bloom", "int4"), ("gpt2", "int8")],
)
def test_what_is_handed_over_computes_what_the_program_computes(family: str, recipe: str) -> None:
    program = rewritten(family, recipe)
    tensors = padded(program)
    expected = program.module(*tensors)
    module = Handover(program, torch.device("cpu"))
    archive = module.exported(tensors, {"batch": (2, 3, 6), "sequence": (2, 7, 14)})
    for inputs in (tensors, padded(program, 2, 13)):
        expected, found = program.module(*inputs), archive.module()(*inputs)
        assert found[0].isfinite().all()
        assert relative_error(found[0], expected[0]) < MEASURED.get(recipe, 1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ops_that_stay_are_those_with_converters(recipe: str) -> None:
    program = rewritten("llama", recipe)
    archive = Handover(program, torch.device("cpu")).exported(padded(program), {})
    calls = [node for node in archive.graph.nodes if node.op == "call_function"]
    assert Counter(op_of(n.target).name for n in calls if op_of(n.target)) == KEPT[recipe]
    assert not any("_safe_softmax" in str(n.target) for n in calls)
    known = {node.name for node in program.calls()}
    assert {n.meta["custom"]["graphwright_node"] for n in calls if op_of(n.target)} <= known


def test_products_over_codes_are_handed_over_in_one_form() -> None:
    program = rewritten("llama", "int4")
    asymmetric = [n for n in program.calls(ops.quantized_linear.target) if n.args[3] is not None]
    assert asymmetric  # else this shows nothing
    archive = Handover(program, torch.device("cpu")).exported(padded(program), {})
    for node in archive.graph.nodes:
        if node.target is ops.quantized_linear.target:
            assert node.args[3] is None  # zero points are a product of their own
            assert node.args[4] is None  # and so is the bias
            assert node.args[0].meta["val"].shape[-1] % node.args[6] == 0


def test_groups_that_the_width_does_not_fill_are_padded() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(0, 16, (24, 64))
            self.register_buffer("weight", packing.pack(codes, "int4", 32))
            self.register_buffer("scale", torch.rand(24, 2))
            self.register_buffer("zero", torch.randint(0, 16, (24, 2)).float())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.quantized_linear(x, self.weight, self.scale, self.zero, None, "int4", 32)

    program = capture(Narrow(), {"x": torch.randn(2, 5, 40)})
    x = torch.randn(2, 5, 40)
    archive = Handover(program, torch.device("cpu")).exported([x], {})
    (product,) = [n for n in archive.graph.nodes if n.target is ops.quantized_linear.target]
    assert product.args[0].meta["val"].shape[-1] == 64
    assert relative_error(archive.module()(x)[0], program.module(x)[0]) < 1e-5


class Places(TorchDispatchMode):
    """Where every tensor is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.found |= {leaf.device.type for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)}
        return made


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int4-fp16"])
def test_everything_is_made_on_the_device(recipe: str) -> None:
    program = rewritten("llama", recipe)
    module = Handover(program, torch.device("meta"))
    inputs = [tensor.to("meta") for tensor in padded(program)]
    with Places() as places:
        module(*inputs)
    assert places.found == {"meta"}


def test_regions_on_a_gpu_are_rewritten_on_the_cpu() -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(4, device=x.device) + torch.full((4,), 2, device=x.device)

    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        traced = make_fx(Shifted(), pre_dispatch=True)(torch.empty(4, device="cuda"))
    assert any(node.kwargs.get("device") == torch.device("cuda", 0) for node in traced.graph.nodes)
    to_cpu(traced)
    assert torch.equal(traced(torch.zeros(4)), torch.tensor([2.0, 3, 4, 5]))


# With a stand-in for the package


class Compiled(nn.Module):
    """As what the package makes: parts, of which one stays in PyTorch; it runs the archive eagerly."""

    def __init__(self, archive: torch.export.ExportedProgram, taken) -> None:
        super().__init__()
        self._module = [archive.module()]
        self._run_on_gpu_0 = torch.fx.GraphModule({}, torch.fx.Graph())
        for node in archive.graph.nodes:
            if node.op == "call_function" and not taken(node):
                copied = self._run_on_gpu_0.graph.call_function(node.target)
                copied.meta = node.meta
        self.graph = torch.fx.Graph()

    def forward(self, *inputs: torch.Tensor):
        return self._module[0](*inputs)


class Registry:
    """Takes everything but the node that the test names."""

    def __init__(self) -> None:
        self.refused: set = set()

    def __contains__(self, node) -> bool:
        return node.target not in self.refused


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """A package `torch_tensorrt` that says what it was asked for, and a GPU."""
    asked: list[SimpleNamespace] = []
    package, registry = ModuleType("torch_tensorrt"), Registry()

    def compile(archive, arg_inputs, **options):
        asked.append(SimpleNamespace(archive=archive, inputs=arg_inputs, options=options))
        return Compiled(archive, registry.__contains__)

    package.dynamo = SimpleNamespace(compile=compile, conversion=SimpleNamespace(DYNAMO_CONVERTERS=registry))
    package.Input = lambda **given: SimpleNamespace(**given)
    package.__spec__ = SimpleNamespace(name="torch_tensorrt")
    converters = ModuleType("graphwright.backends.tensorrt.converters")
    converters.refusal = lambda _node: ""
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setitem(sys.modules, "graphwright.backends.tensorrt.converters", converters)
    for module in (jit, executable, graphwright.target):
        monkeypatch.setattr(module, "local_gpu", lambda: "cuda:sm_89")
    torch._dynamo.reset()
    yield SimpleNamespace(asked=asked, registry=registry)
    torch._dynamo.reset()


@torch.no_grad()
def test_torch_compile_reaches_it(stand_in) -> None:
    model, reports = build("llama"), []
    options = {"backend": "tensorrt", "recipe": {"passes": RECIPES["int8"]}, "coverage": reports.append}
    compiled = torch.compile(model, backend="graphwright", options=options, dynamic=True)
    for batch, length in ((2, 8), (3, 11), (2, 40)):
        ids = torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(length))
        found = compiled(input_ids=ids, use_cache=False).logits
        assert 0 < mean_kl(found, model(input_ids=ids, use_cache=False).logits) < 0.05
    # Built for twice the first sizes; the last call was beyond, and had engines built anew.
    assert [one.inputs[0].max_shape for one in stand_in.asked] == [(4, 16), (4, 80)]
    assert stand_in.asked[0].inputs[0].min_shape == (2, 2)
    assert stand_in.asked[0].options["attn_bias_is_causal"] is False
    assert len(reports) == 1
    assert reports[0].left == {}
    assert reports[0].lowered["quantized_linear"] > 8


@torch.no_grad()
def test_what_stays_out_is_named(stand_in) -> None:
    stand_in.registry.refused = {torch.ops.aten.silu.default}
    reports = []
    options = {"backend": "tensorrt", "target": "tensorrt:sm_89", "coverage": reports.append}
    compiled = torch.compile(build("llama"), backend="graphwright", options=options)
    with pytest.warns(
        UserWarning, match=r"2 nodes run in PyTorch between TensorRT engines.*no converter for this silu"
    ):
        compiled(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert len(reports[0].left) == 2
    assert all(name.startswith("gated_activation") for name in reports[0].left)
    assert reports[0].fallbacks == {"gated_activation": 2}


@torch.no_grad()
def test_a_static_cache_is_written(stand_in) -> None:
    model = build("llama")
    ids = torch.randint(3, 120, (1, 6), generator=torch.Generator().manual_seed(1))

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=16)
        outputs = [forward(input_ids=ids[:, :4], past_key_values=cache, use_cache=True).logits]
        outputs += [forward(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in (4, 5)]
        return torch.cat(outputs, 1)

    expected = steps(model)
    compiled = torch.compile(model, backend="graphwright", options={"backend": "tensorrt"})
    assert relative_error(steps(compiled), expected) < 1e-4


@torch.no_grad()
def test_a_failed_build_is_no_silent_fallback(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*_arguments, **_options):
        raise AssertionError("Failed to build the engine")

    sys.modules["torch_tensorrt"].dynamo.compile = compile
    compiled = torch.compile(nn.Linear(8, 8), backend="graphwright", options={"backend": "tensorrt"})
    with pytest.raises(BackendError, match=r"does not compile the region: Failed to build.*Use graphwright compile"):
        compiled(torch.randn(3, 8))


@pytest.mark.parametrize("options", [{"backend": "tensorrt"}, {"backend": "tensorrt", "target": "tensorrt:sm_120"}])
def test_another_gpu_is_named(stand_in, options: dict[str, str]) -> None:
    if "target" in options:
        compiled = torch.compile(nn.Linear(8, 8), backend="graphwright", options=options)
        with pytest.raises(Exception, match="built for sm_120, and this machine's GPU is cuda:sm_89"):
            compiled(torch.randn(3, 8))
    else:
        BACKEND.require_jit(Target.parse("tensorrt"))  # the GPU at hand


# Without the package or a GPU


@pytest.mark.parametrize("options", [{"backend": "tensorrt"}, {"target": "tensorrt:sm_89"}])
def test_a_missing_package_is_named(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch_tensorrt" else real(name, *rest)
    )
    torch._dynamo.reset()
    compiled = torch.compile(nn.Linear(8, 8), backend="graphwright", options=options)
    with pytest.raises(
        Exception, match=r"graphwright\[torch-tensorrt\].*Use graphwright compile --target tensorrt:sm_89"
    ):
        compiled(torch.randn(3, 8))


def test_a_missing_gpu_is_named(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "local_gpu", lambda: None)
    compiled = torch.compile(nn.Linear(8, 8), backend="graphwright", options={"backend": "tensorrt"})
    with pytest.raises(Exception, match=r"PyTorch can use none here.*Use graphwright compile --target tensorrt:sm_89"):
        compiled(torch.randn(3, 8))


def test_a_package_that_cannot_be_imported_is_explained(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *rest: str) -> ModuleType:
        if name == "torch_tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackendError, match=r"cannot be imported: libnvinfer.*graphwright\[torch-tensorrt\]"):
        jit.torch_tensorrt()


def test_coverage_of_a_backend_that_knows_before() -> None:
    program = rewritten("llama", "fp32")
    backend = SimpleNamespace(supports=lambda node, target: SimpleNamespace(ok=True, reason=""))
    found = region_coverage(program, backend, Target.parse("cpu"), None)
    assert found.lowered["rms_norm"] == 5


# Where the package is there, with its GPU


def test_torch_tensorrt_takes_what_has_a_converter() -> None:
    with questions_answered("sm_89"):
        pytest.importorskip("torch_tensorrt", exc_type=Exception)
        registry = jit.torch_tensorrt().dynamo.conversion.DYNAMO_CONVERTERS
    program = rewritten("llama", "int4-fp16")
    archive = Handover(program, torch.device("cpu")).exported(padded(program), {})
    flat = archive.module().graph  # weights are attributes there, as the package reads them
    own = [node for node in flat.nodes if node.op == "call_function" and op_of(node.target)]
    assert len(own) == 12
    assert all(node in registry for node in own)
