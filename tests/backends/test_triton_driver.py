"""Launching binaries through a stand-in for the GPU's driver, which writes down what it is asked to do."""

import subprocess
from pathlib import Path

import pytest
import torch

from graphwright.backends.triton import store
from graphwright.backends.triton.build import Binary, Found
from graphwright.backends.triton.driver import Binaries, Driver
from graphwright.backends.triton.executable import require_gpu
from graphwright.backends.triton.machine_code import Resources
from graphwright.errors import ArtifactError, BackendError, TargetError
from graphwright.kernels.triton.device import DEVICES
from graphwright.kernels.triton.launch import Config, Launch, Recorder, Work
from graphwright.kernels.triton.norm import normalize, rms_norm
from graphwright.target import local_gpu

DEVICE = DEVICES["cuda:sm_90"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    made, record = folder / "libfake.so", folder / "record"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", f'-DRECORD="{record}"', "-o", made, source], check=True)
    return made, record


class Kernel:
    """Stands for a `@triton.jit` function: what a launch asks of it."""

    arg_names = ["x_ptr", "bias_ptr", "out_ptr", "count", "eps", "WIDTH", "BLOCK"]

    @staticmethod
    def fn():
        """Has a module and a name."""


def launch(x, out, count=7, blocks=3):
    return Launch(
        Kernel,
        {"x_ptr": x, "bias_ptr": None, "out_ptr": out, "count": count, "eps": 0.5},
        {"WIDTH": 16},
        (Config.of(2, BLOCK=64), Config.of(8, 3, BLOCK=128)),
        lambda config: (blocks, config["BLOCK"]),
        lambda config: Work(1, 1),
    )


def stored(folder: Path, shared: int, name: str = "kernel", code: bytes = b"\x7fELF"):
    x = torch.empty(4, device="meta")
    one = launch(x, x)
    folder.mkdir(exist_ok=True)
    binary = folder / "made.cubin"
    binary.write_bytes(code)
    resources = Resources(32, 0, shared, {"HMMA": 4}, {128: 2, 32: 1}, 100)
    made = Binary(one.problem(), one.configs[1], DEVICE.name, binary, name, shared, resources, 1e-6)
    store.write(folder, DEVICE.name, [Found(one, one.problem(), made, {"BLOCK=64": "2 register spills"})])
    return store.read(folder, DEVICE.name)


def test_a_launch_reaches_the_driver_as_it_was_compiled(library, tmp_path):
    path, record = library
    entries = stored(tmp_path, 100_000)
    run = Binaries(DEVICE, entries, Driver("cuda", str(path)))
    x, out = torch.zeros(16), torch.zeros(16)
    run(launch(x, out, count=41))
    run(launch(x, out, count=42, blocks=9))
    run(launch(x, out, blocks=0))
    lines = record.read_text().splitlines()
    assert lines[0] == "attribute kernel 8 100000", "more than 48 KiB must be allowed first"
    for line, count, blocks in zip(lines[1:], (41, 42), (3, 9), strict=True):
        assert line.split()[:9] == f"launch kernel {blocks} 128 1 256 1 1 100000".split()
        found = line.split()[9:]
        assert [int(found[0], 16), int(found[1]), float(found[2])] == [x.data_ptr(), count, 0.5]
        assert found[3] == "(nil)", "scratch memory is not used"


def test_the_index_survives_a_round_trip(tmp_path):
    (entry,) = stored(tmp_path, 64)
    assert entry.problem == launch(torch.zeros(4), torch.zeros(4)).problem()
    assert entry.config == Config.of(8, 3, BLOCK=128)
    assert entry.refused == {"BLOCK=64": "2 register spills"}
    assert store.targets_in(tmp_path) == ["cuda:sm_90"]
    (row,) = store.rows([entry], "cuda:sm_90")
    assert row["loads"] == "2x128 1x32"


def test_what_was_not_compiled_is_refused(library, tmp_path):
    run = Binaries(DEVICE, stored(tmp_path, 64), Driver("cuda", str(library[0])))
    other = launch(torch.zeros(16, dtype=torch.float16), torch.zeros(16))
    with pytest.raises(ArtifactError, match="no binary of fn for these sizes on cuda:sm_90"):
        run(other)
    x = torch.zeros(17)[1:]
    with pytest.raises(BackendError, match="Tensor x starts at an address that is no multiple of 16"):
        run(launch(x, torch.zeros(16)))


def test_the_driver_is_heard(library, tmp_path):
    x = torch.zeros(16)
    for code, name, problem in ((b"junk", "kernel", "invalid image"), (b"\x7fELF", "missing", "not found")):
        run = Binaries(DEVICE, stored(tmp_path / name, 64, name, code), Driver("cuda", str(library[0])))
        with pytest.raises(BackendError, match=problem):
            run(launch(x, x))
    with pytest.raises(BackendError, match="driver library nowhere.so cannot be loaded"):
        Driver("cuda", "nowhere.so")


def test_another_target_and_a_damaged_index(tmp_path):
    stored(tmp_path, 64)
    with pytest.raises(ArtifactError, match="no kernels for rocm:gfx942. It holds kernels for cuda:sm_90"):
        store.read(tmp_path, "rocm:gfx942")
    (tmp_path / "cuda-sm_90" / "index.json").write_text("[{}]")
    with pytest.raises(ArtifactError, match="cannot be read"):
        store.read(tmp_path, "cuda:sm_90")


def test_equal_problems_have_equal_keys():
    recorder = Recorder(DEVICE)
    for rows, dtype in ((3, torch.float16), (700, torch.float16), (3, torch.float32)):
        rms_norm(recorder, torch.empty(rows, 64, dtype=dtype, device="meta"), None, 1e-6)
    first, second, third = (one.problem() for one in recorder.launches)
    assert (first, first.key) == (second, second.key)
    assert first.key != third.key
    assert first.kernel == normalize.fn.__name__


@pytest.mark.skipif(local_gpu() is not None, reason="says what is missing without a GPU")
def test_running_elsewhere_says_what_to_do(monkeypatch):
    with pytest.raises(TargetError, match="compiled for cuda:sm_90, and this machine has no GPU"):
        require_gpu("cuda:sm_90")
    monkeypatch.setattr("graphwright.backends.triton.executable.local_gpu", lambda: "cuda:sm_80")
    with pytest.raises(TargetError, match="this machine's GPU is cuda:sm_80. Compile it for cuda:sm_80"):
        require_gpu("cuda:sm_90")
