"""Machine code for GPUs, made and inspected without one: gates, cache, failures, and a whole program's artifact."""

import json
import os
import subprocess
import sys

import pytest
import torch
from backends.test_inductor_regions import inputs_for
from families.configs import build as build_model

import graphwright
from graphwright import registry
from graphwright.backends.triton import BACKEND, build, store
from graphwright.backends.triton.build import Workers
from graphwright.backends.triton.machine_code import Resources, failures, occupied
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.errors import ArtifactError, BackendError, TargetError
from graphwright.kernels.triton import (
    decode_attention,
    flash_attention,
    grouped_gemm,
    integer_gemm,
    kivi,
    kivi_attention,
    norm,
    quantized_gemm,
    rope,
    sampling,
    sparse_gemm,
)
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Config, Recorder
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target, local_gpu

pytestmark = pytest.mark.slow

CASES = [
    (flash_attention, "head_dim 128 causal", "cuda:sm_90", "HGMMA"),
    (flash_attention, "head_dim 64 causal", "cuda:sm_100", "UTCHMMA"),
    (flash_attention, "head_dim 128 positions", "rocm:gfx942", "v_mfma"),
    (flash_attention, "head_dim 64 causal", "rocm:gfx1100", "v_wmma"),
    (flash_attention, "head_dim 128 packed", "cuda:sm_90", "HGMMA"),
    (flash_attention, "head_dim 128 packed", "cuda:sm_80", "HMMA"),
    (flash_attention, "head_dim 128 packed", "cuda:sm_100", "UTCHMMA"),
    (flash_attention, "head_dim 128 packed", "rocm:gfx942", "v_mfma"),
    (decode_attention, "paged", "cuda:sm_80", "HMMA"),
    (decode_attention, "int8 cache", "rocm:gfx950", "v_mfma"),
    (decode_attention, "bits of fp8", "rocm:gfx942", "v_mfma"),
    (kivi, "2-bit keys", "cuda:sm_90", ""),
    (kivi, "4-bit values", "rocm:gfx942", ""),
    (kivi_attention, "2 bits, 4096 keys", "cuda:sm_90", "HMMA"),
    (kivi_attention, "2 bits, 4096 keys", "cuda:sm_100", "HMMA"),
    (kivi_attention, "2 bits, 4096 keys", "rocm:gfx942", "v_mfma"),
    (quantized_gemm, "int4 group 128, 2048 rows", "cuda:sm_90", "HGMMA"),
    (quantized_gemm, "int4 group 128, 16 rows", "cuda:sm_120", "HMMA"),
    (quantized_gemm, "int3 group 128, 16 rows", "cuda:sm_80", "HMMA"),
    (quantized_gemm, "int3 group 128, 2048 rows", "cuda:sm_90", "HGMMA"),
    (quantized_gemm, "int3 group 128, 2048 rows", "cuda:sm_100", "UTCHMMA"),
    (quantized_gemm, "int3 group 128, 2048 rows", "rocm:gfx942", "v_mfma"),
    (quantized_gemm, "int2 group 64, 2048 rows", "cuda:sm_90", "HGMMA"),
    (quantized_gemm, "nf4 group 64, 2048 rows", "cuda:sm_90", "HGMMA"),
    (quantized_gemm, "nf4 group 64, 2048 rows", "rocm:gfx942", "v_mfma"),
    (quantized_gemm, "mxfp4 group 32, 2048 rows", "cuda:sm_100", "UTCHMMA"),
    (integer_gemm, "int8 per row, 2048 rows", "cuda:sm_89", "IMMA"),
    (integer_gemm, "int8 per row, 2048 rows", "rocm:gfx90a", "v_mfma_i32"),
    (integer_gemm, "fp8 per row, 2048 rows", "cuda:sm_90", "QGMMA"),
    (grouped_gemm, "8 experts, 4096 rows", "cuda:sm_90", "HGMMA"),
    (norm, "add_rms_norm 4096", "cuda:sm_80", ""),
    (rope, "cache write", "rocm:gfx942", ""),
    (sampling, "draw 128256", "cuda:sm_90", ""),
    (sampling, "draw 128256", "rocm:gfx942", ""),
]


def quiet(_text, _fraction):
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    with Workers(2, tmp_path_factory.mktemp("cache")) as started:
        yield started


@pytest.mark.parametrize(
    ("family", "shape", "target", "matrix"), CASES, ids=lambda value: str(value).rpartition(".")[2][:40]
)
def test_kernels_pass_their_gates(workers, family, shape, target, matrix):
    device = DEVICES[target]
    recorder = Recorder(device)
    family.SHAPES[shape](recorder, torch.bfloat16)
    for found in build.build(recorder.launches, device, quiet, workers=workers):
        assert found.binary is not None, found.refused
        assert not [reason for reason in found.refused.values() if "Error" in reason], "a kernel that does not compile"
        resources, config = found.binary.resources, found.binary.config
        assert failures(resources, config, device, matrix=found.problem.matrix) == []
        assert resources.spills == 0
        assert 0 < occupied(resources, config, device) <= 1
        assert found.binary.path.read_bytes()[:4] == b"\x7fELF"
        if found.problem.matrix:
            assert any(opcode.startswith(matrix) for opcode in resources.matrix), resources.matrix
            assert resources.widest_load == 128


@pytest.mark.parametrize(
    ("shape", "target", "matrix"),
    [
        ("int8 group 128, 16 rows", "cuda:sm_90", "HMMA"),
        ("int4 group 128, 16 rows", "rocm:gfx942", "v_mfma"),
        ("int4 group 32, 512 rows", "cuda:sm_100", "UTCHMMA"),
    ],
)
def test_two_in_four_in_codes_passes_its_gates(workers, shape, target, matrix):
    """Loads are as narrow as planes of codes are short, so there is no gate for their width."""
    device = DEVICES[target]
    recorder = Recorder(device)
    sparse_gemm.SHAPES[shape](recorder, torch.bfloat16)
    (found,) = build.build(recorder.launches, device, quiet, workers=workers)
    assert found.binary is not None, found.refused
    resources = found.binary.resources
    assert failures(resources, found.binary.config, device, matrix=True) == []
    assert resources.spills == 0
    assert any(opcode.startswith(matrix) for opcode in resources.matrix), resources.matrix


def test_a_second_build_is_taken_from_the_cache(workers):
    device = DEVICES["cuda:sm_80"]
    recorder = Recorder(device)
    norm.SHAPES["rms_norm 576"](recorder, torch.float16)
    (one,) = recorder.launches
    answers = [workers.compile(one.problem(), one.configs[0], device) for _ in range(2)]
    assert [answer.pop("cached") for answer in answers] == [False, True]
    assert answers[0] == answers[1]


def test_a_wider_search_takes_the_fastest_that_passes(workers):
    device = DEVICES["cuda:sm_80"]
    recorder = Recorder(device)
    quantized_gemm.SHAPES["int4 group 128, 16 rows"](recorder, torch.float16)
    first, best = (build.search(recorder.launches[0], device, workers, width) for width in (1, 4))
    assert best.binary.seconds <= first.binary.seconds


def test_a_configuration_that_fails_is_replaced_and_reported(workers):
    device = DEVICES["rocm:gfx942"]
    recorder = Recorder(device)
    quantized_gemm.SHAPES["int4 group 128, 2048 rows"](recorder, torch.float16)
    found = build.search(recorder.launches[0], device, workers)
    assert found.binary is not None
    assert any("bytes of shared memory, and a block has 65536" in reason for reason in found.refused.values())


def test_the_gates_see_what_they_are_for():
    device, config = DEVICES["cuda:sm_90"], Config.of(8)
    fine = Resources(128, 0, 1000, {"HGMMA": 2}, {128: 4}, 500)
    assert failures(fine, config, device, matrix=True) == []
    broken = Resources(128, 3, 300_000, {}, {32: 4}, 500)
    assert failures(broken, config, device, matrix=True) == [
        "3 register spills",
        "no wgmma instruction",
        "300000 bytes of shared memory, and a block has 232448",
    ]
    heavy = Resources(255, 0, 0, {}, {}, 1)
    assert failures(heavy, Config.of(16), device, matrix=False) == ["255 registers in 16 warps do not fit a unit"]


def test_a_compiler_that_dies_costs_one_job(workers):
    device = DEVICES["cuda:sm_80"]
    recorder = Recorder(device)
    norm.SHAPES["rms_norm 576"](recorder, torch.float32)
    (one,) = recorder.launches
    with Workers(1, workers.cache) as own:
        own._started[0].kill()
        answer = own.compile(one.problem(), one.configs[0], device)
        assert "ended with status -9" in answer["error"]
        assert "error" not in own.compile(one.problem(), one.configs[0], device)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A tiny bfloat16 llama in int4 for two targets."""
    folder = tmp_path_factory.mktemp("artifact")
    model = build_model("llama", num_hidden_layers=2).to(torch.bfloat16)
    program = rewrite(capture(model), Recipe.load("int4"), Target.parse("cpu"), CompileOptions(verify=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        compiled = graphwright.compile(program, "none", "cuda:sm_90", also=("rocm:gfx942",), verify=False)
    return program, compiled, compiled.save(folder / "out")


def test_a_program_for_two_targets(artifact):
    program, compiled, folder = artifact
    assert store.targets_in(folder / "kernels") == ["cuda:sm_90", "rocm:gfx942"]
    for target, kind in (("cuda:sm_90", "cubin"), ("rocm:gfx942", "hsaco")):
        entries = store.read(folder / "kernels", target)
        assert {
            "normalize", "gate", "gemv", "gemm", "flash_attention", "split_attention", "rotate_and_store",
            "best_part", "best_of_parts", "draw_row",
        } <= {entry.problem.kernel for entry in entries}  # fmt: skip
        for entry in entries:
            assert entry.file.suffix == f".{kind}"
            assert entry.resources.spills == 0
            assert not [reason for reason in entry.refused.values() if "Error" in reason]
    assert compiled.also == ("rocm:gfx942",)
    assert compiled.report.coverage["lowered"]["quantized_linear"] > 0
    assert Program.load(folder).text() == program.text()


@pytest.mark.skipif(local_gpu() is not None, reason="says what is missing without a GPU")
def test_an_artifact_for_another_machine_explains_itself(artifact):
    _, compiled, folder = artifact
    with pytest.raises(TargetError, match="this machine has no GPU"):
        compiled(**inputs_for(compiled.program, 1, 1, 9))
    with pytest.raises(TargetError, match="this machine has no GPU"):
        graphwright.load(folder)
    with pytest.raises(ArtifactError, match=r"compiled for cuda:sm_90 \(sm_90\), rocm:gfx942, and this is cuda:sm_80"):
        graphwright.load(folder, target="cuda:sm_80")
    with pytest.raises(ArtifactError, match="and this is cpu"):
        graphwright.load(folder, target="cpu")


def test_a_damaged_kernel_is_found(artifact):
    _, _, folder = artifact
    file = store.read(folder / "kernels", "cuda:sm_90")[0].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        with pytest.raises(ArtifactError, match="bytes long and should be"):
            graphwright.load(folder, target="cuda:sm_90")
    finally:
        file.write_bytes(whole)


def test_inspect_lists_the_kernels_on_any_machine(artifact):
    _, _, folder = artifact
    command = [sys.executable, "-m", "graphwright.cli", "inspect", str(folder), "--kernels", "--json"]
    code = "import sys; from graphwright.cli import main; sys.argv = sys.argv[1:]; main()"
    done = subprocess.run([sys.executable, "-c", code, *command[2:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == {"cuda:sm_90", "rocm:gfx942"}
    assert all(row["spills"] == 0 and row["registers"] > 0 and row["estimate"] for row in rows)
    assert rows == BACKEND.kernels(folder / "kernels")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="kernel cache .* cannot be written"), Workers(1, tmp_path / "file" / "x"):
        pass


IR = """
import importlib, pkgutil, re, sys, torch
import graphwright.kernels.triton as package
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Recorder
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)

def text(launch):
    problem, config = launch.problem(), launch.configs[0]
    types = dict(problem.types)
    signature = {name: types.get(name, "constexpr") for name in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, {**dict(problem.constants), **dict(config.constants)})
    options = backend.parse_options({"num_warps": config.num_warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    return re.sub(r"loc\\(.*|#loc.*", "", module.str_nodebug())

count = 0
for info in pkgutil.iter_modules(package.__path__):
    family = importlib.import_module(f"graphwright.kernels.triton.{info.name}")
    for name, call in getattr(family, "SHAPES", {}).items():
        texts = []
        for dtype in (torch.float16, torch.bfloat16):
            recorder = Recorder(DEVICES["cuda:sm_90"])
            call(recorder, dtype)
            texts.append("\\n".join(text(launch) for launch in recorder.launches))
        half, brain = texts
        assert "bf16" not in half, name
        assert "bf16" in brain or "f16" not in half, name
        # Names of functions within spell a type as Triton does: fp16, and scales are of it whatever is multiplied.
        if brain.replace("bf16", "f16").replace("fp16", "f16") != half.replace("fp16", "f16"):
            sys.exit(f"{info.name}: {name} computes differently in bfloat16")
        count += 1
print(count)
"""


def test_bfloat16_kernels_are_the_float16_kernels_with_another_type():
    """The interpreter multiplies bfloat16 wrongly, so equality of the code stands in for a run of it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", IR], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50


def test_the_registry_finds_the_backend():
    assert registry.backend("triton") is BACKEND
    assert all(Target.parse(name).backends == ("triton",) for name in DEVICES)
