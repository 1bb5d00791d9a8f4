"""Choosing tokens on a GPU: its kernels are planned with a program, stored, and found again for what it makes."""

import subprocess
from pathlib import Path

import pytest
import torch
from backends.test_triton_lowering import made
from torch import nn

from graphwright.backends.triton import driver, executable, lowering, plan, store
from graphwright.backends.triton.build import Binary, Found
from graphwright.backends.triton.driver import Binaries, Driver
from graphwright.backends.triton.executable import TritonExecutable
from graphwright.backends.triton.machine_code import Resources
from graphwright.capture import capture
from graphwright.errors import ArtifactError
from graphwright.kernels.triton import sampling
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Recorder
from graphwright.ops import sample_tokens

DEVICE = DEVICES["cuda:sm_90"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    path, record = folder / "libfake.so", folder / "record"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", f'-DRECORD="{record}"', "-o", path, source], check=True)
    return path, record


def stored(folder: Path):
    """An artifact's kernels, of which there is only a name."""
    program = lowering.lower(made("llama", "int4"))
    binary, found = folder / "made.cubin", []
    binary.write_bytes(b"\x7fELF")
    for launch in plan.sampling_launches(program, DEVICE):
        problem, resources = launch.problem(), Resources(32, 0, 0, {}, {128: 1}, 100)
        done = Binary(problem, launch.configs[0], DEVICE.name, binary, problem.kernel, 0, resources, 1e-6)
        found.append(Found(launch, problem, done))
    store.write(folder, DEVICE.name, found)
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 65])
def test_every_choice_was_planned(batch, dtype):
    program = lowering.lower(made("llama", "int4"))
    (output,) = program.graph.find_nodes(op="output")
    logits = output.args[0][0]
    width = logits.meta["val"].shape[-1]
    logits.meta["val"] = logits.meta["val"].to(dtype)
    planned = {launch.problem() for launch in plan.sampling_launches(program, DEVICE)}
    for kind in (dtype, torch.float32):
        recorder = Recorder(DEVICE)
        step = torch.empty(batch, 1, width, dtype=kind, device="meta")[:, -1]
        for options in ((0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 50, 0.9, 0.1)):
            sampling.sample_tokens(recorder, step, torch.empty(batch, dtype=torch.float64, device="meta"), *options)
        assert {launch.problem() for launch in recorder.launches} <= planned


def test_a_program_without_caches_chooses_nothing():
    assert plan.sampling_launches(capture(nn.Linear(4, 4), (torch.randn(2, 4),)), DEVICE) == []


def test_binaries_choose_tokens(library, tmp_path):
    path, record = library
    stored(tmp_path)
    width = 128
    run = Binaries(DEVICE, store.read(tmp_path, DEVICE.name), Driver("cuda", str(path)))
    uniform = torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)
    for temperature in (0.0, 1.0):
        sampling.sample_tokens(run, torch.randn(3, width), uniform, temperature, 5, 0.9, 0.0)
    launched = [line.split()[1:5] for line in record.read_text().splitlines()]
    assert launched == [["best_part", "3", "1", "1"], ["best_of_parts", "3", "1", "1"], ["draw_row", "3", "1", "1"]]
    with pytest.raises(ArtifactError, match="no binary of draw_row"):
        sampling.sample_tokens(run, torch.randn(3, 127), uniform, 1.0, 5, 0.9, 0.0)


def test_one_row_may_be_any_of_a_prompt():
    """Where it lies among others is no part of a kernel."""
    found = []
    for length in (1, 16):
        recorder, whole = Recorder(DEVICE), torch.empty(1, length, 127, device="meta")
        uniform = torch.empty(1, dtype=torch.float64, device="meta")
        sampling.sample_tokens(recorder, whole[:, -1], uniform, 1.0, 0, 1.0, 0.0)
        found.append(recorder.launches[0].problem())
    assert found[0] == found[1]


def test_an_executable_chooses_from_logits_that_stay(library, tmp_path, monkeypatch):
    """On a stand-in for a GPU that computes as the CPU does."""
    program = stored(tmp_path)
    monkeypatch.setattr(executable, "local_gpu", lambda: DEVICE.name)
    monkeypatch.setitem(driver.LIBRARIES, "cuda", (str(library[0]),))
    monkeypatch.setattr(TritonExecutable, "device", torch.device("cpu"))
    run = TritonExecutable(program.module, program.contract, DEVICE.name, tmp_path)
    uniform = torch.rand(4, dtype=torch.float64)
    for logits in (torch.randn(4, 128), torch.randn(4, 3, 127)[:, -1], torch.randn(1, 3, 127)[:, -1]):
        arguments = (logits, uniform[: len(logits)], 0.8, 20, 0.9, 0.05)
        assert torch.equal(run.sample(*arguments), sample_tokens.reference(*arguments))
