"""The TVM backend as a whole: artifacts, the automatic choice, torch.compile, machine code, views."""

import os
import subprocess
import sys

import pytest
import torch
from families.configs import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright
from graphwright.backends.tvm.build import build_kernels, forms, translate
from graphwright.backends.tvm.layout import tile_weights
from graphwright.backends.tvm.values import expand, insert, narrow, reshape, transpose
from graphwright.kernels.tir.emit import Layout
from graphwright.kernels.tir.tiles import fits
from graphwright.op import OPS
from graphwright.target import Target

LOAD = """
import sys, torch, graphwright
compiled = graphwright.load(sys.argv[1])
result = compiled.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=6)
print(compiled.backend, result.tokens[0], "transformers" in sys.modules)
"""


@pytest.fixture(scope="module")
def compiled():
    return graphwright.compile(build("llama"), "int4-dynamic")


def test_it_is_chosen_where_it_lowers_everything(compiled):
    assert compiled.backend == "tvm"
    assert compiled.report.coverage["passed_over"] == {}


def test_an_artifact_runs_in_a_fresh_process(compiled, tmp_path):
    compiled.save(tmp_path / "artifact")
    expected = compiled.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=6).tokens[0]
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "artifact")], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().splitlines()[-1] == f"tvm {expected} False"


THREADS = """
import os, sys, torch, tvm_ffi, graphwright
from concurrent.futures import ThreadPoolExecutor
cores = os.sched_getaffinity(0)
compiled = graphwright.load(sys.argv[1])
count = tvm_ffi.get_global_func("runtime.NumThreads")
def used(threads):
    torch.set_num_threads(threads)
    compiled.logits(torch.tensor([[3, 1, 4]]))
    return count()
found = [used(2), used(1), used(2), ThreadPoolExecutor(1).submit(used, 2).result()]
print(found == [min(2, len(cores)), 1, min(2, len(cores)), min(2, len(cores))], os.sched_getaffinity(0) == cores)
"""


def test_threads_are_those_of_torch_and_are_not_pinned(compiled, tmp_path):
    compiled.save(tmp_path / "artifact")
    command = [sys.executable, "-c", THREADS, str(tmp_path / "artifact")]
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "TVM_NUM_THREADS")}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip().splitlines()[-1] == "True True"


def test_weights_are_stored_once_in_tiles(compiled):
    names = compiled.program.weights()
    assert any(name.endswith("_tiles") for name in names)
    assert not any(name.endswith("_int4") for name in names)


def test_kernels_use_the_dot_product_instruction(compiled):
    target = Target.parse("cpu")
    if not {"avx512_vnni", "avx_vnni"} & set(target.features):
        pytest.skip("this CPU has no VNNI")
    _, kernels = translate(compiled.program, target, forms(compiled.program))
    library = build_kernels(kernels, target)
    assert "vpdpbusd" in library.inspect_source("asm")


def test_kernels_are_generated_for_other_instruction_sets(compiled):
    arm = Target("cpu", "cpu", "aarch64", ("asimd", "asimddp"))
    _, kernels = translate(compiled.program, arm, forms(compiled.program))
    assert "sdot" in build_kernels(kernels, arm).inspect_source("asm")


def test_as_a_torch_compile_backend():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    recipe = {"passes": [{"rtn": {"bits": 8, "group_size": 0}}, "activations"]}
    run = torch.compile(model, backend="graphwright", options={"recipe": recipe, "backend": "tvm"}, dynamic=True)
    for rows in (1, 5):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            assert float((run(x) - model(x)).norm() / model(x).norm()) < 0.02


@pytest.mark.parametrize("name", ["tiled_linear", "tiled_embedding"])
def test_tiled_ops_equal_the_plain_ones(name):
    torch.manual_seed(0)
    tiled_samples = list(OPS[name].samples_of(torch.float32))
    torch.manual_seed(0)
    plain = [
        s
        for s in OPS[f"quantized_{name.removeprefix('tiled_')}"].samples_of(torch.float32)
        if fits(*(s.args[5:7] if name == "tiled_linear" else s.args[4:6]))
    ]
    assert plain
    for tiled, sample in zip(tiled_samples, plain, strict=True):
        expected = OPS[f"quantized_{name.removeprefix('tiled_')}"](*sample.args)
        assert torch.equal(OPS[name](*tiled.args), expected)


def test_a_group_that_does_not_fit_stays_in_the_plain_layout():
    program = graphwright.capture(nn.Linear(36, 8), (torch.randn(2, 36),))
    recipe = {"passes": [{"rtn": {"bits": 4, "group_size": 12}}]}
    rewritten = graphwright.rewrite(program, graphwright.Recipe.load(recipe), Target.parse("cpu"))
    assert "quantized_linear" in tile_weights(rewritten).text()


@st.composite
def view_chains(draw):
    """A tensor and some view operations on it, each with the layout that it should have."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    layout = Layout.contiguous(shape)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["transpose", "narrow", "insert", "expand", "flatten", "split"]))
        dims = tensor.dim()
        if kind == "transpose":
            order = draw(st.permutations(range(dims)))
            tensor, layout = tensor.permute(order), transpose(layout, order)
        elif kind == "narrow":
            dim = draw(st.integers(0, dims - 1))
            start = draw(st.integers(0, tensor.shape[dim] - 1))
            length = draw(st.integers(1, tensor.shape[dim] - start))
            tensor, layout = tensor.narrow(dim, start, length), narrow(layout, dim, start, length)
        elif kind == "insert" and dims < 5:
            dim = draw(st.integers(0, dims))
            tensor, layout = tensor.unsqueeze(dim), insert(layout, dim)
        elif kind == "expand":
            wanted = [3 if size == 1 else size for size in tensor.shape]
            tensor, layout = tensor.expand(wanted), expand(layout, wanted)
        else:
            wanted = [tensor.numel()] if kind == "flatten" else [1, *tensor.shape]
            made = reshape(layout, wanted)
            if made is None:
                with pytest.raises(RuntimeError):
                    tensor.view(wanted)
                continue
            tensor, layout = tensor.reshape(wanted), made
    return tensor, layout, torch.arange(torch.Size(shape).numel())


@given(view_chains())
@settings(deadline=None, max_examples=150)
def test_layouts_follow_views(chain):
    tensor, layout, memory = chain
    found = torch.as_strided(memory, tensor.shape, layout.strides, layout.offset)
    assert torch.equal(found, tensor)


def test_workers_soon_sleep_unless_the_user_says_otherwise():
    script = "import os; import graphwright.backends.tvm; print(os.environ['TVM_THREAD_POOL_SPIN_COUNT'])"
    environment = {key: value for key, value in os.environ.items() if key != "TVM_THREAD_POOL_SPIN_COUNT"}
    for chosen, expected in (({}, "2000"), ({"TVM_THREAD_POOL_SPIN_COUNT": "7"}, "7")):
        command = [sys.executable, "-P", "-c", script]
        shown = subprocess.run(command, env=environment | chosen, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == expected
