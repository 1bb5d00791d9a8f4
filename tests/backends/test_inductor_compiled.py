"""Compiled programs equal eager ones. Compiling takes seconds, so one program per format is made and shared."""

import subprocess
import sys

import pytest
import torch
from backends.test_inductor_regions import inputs_for, program_of
from torch import nn

from graphwright.backends.inductor import BACKEND
from graphwright.capture import capture
from graphwright.numerics import relative_error
from graphwright.target import Target

pytestmark = pytest.mark.slow

TOLERANCE = 2e-4

SIZES = [(1, 1, 1), (1, 1, 40), (1, 6, 6), (1, 5, 30), (3, 1, 17), (3, 7, 20)]

LOAD = """
import sys, torch
from pathlib import Path
from graphwright.backends.inductor import BACKEND
from graphwright.program import Program, load_weights
from graphwright.target import Target
folder = Path(sys.argv[1])
weights = load_weights(folder / "weights.safetensors")
program = Program.load(folder, weights)
run = BACKEND.load(program.contract, weights, Target.parse("cpu"), folder)
torch.save(run(torch.load(folder / "inputs.pt")), folder / "outputs.pt")
assert "transformers" not in sys.modules, "loading imports transformers"
"""


def quiet(_text, _fraction):
    """Progress that nobody watches."""


@pytest.fixture(scope="module", params=["llama-fp32", "llama-int8", "llama-int4", "mixtral-int4"])
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    program = program_of(*request.param.split("-"))
    return program, BACKEND.compile(program, Target.parse("cpu"), folder, quiet), folder


@pytest.mark.parametrize(("batch", "sequence", "keys"), SIZES)
def test_compiled_equals_eager(compiled, batch, sequence, keys):
    program, run, _ = compiled
    expected_in = inputs_for(program, batch, sequence, keys)
    found_in = {name: tensor.clone() for name, tensor in expected_in.items()}
    expected, found = program(**expected_in), run(found_in)
    assert found[0].dtype == expected[0].dtype
    assert relative_error(found[0], expected[0]) < TOLERANCE
    for spec in program.contract.state:
        got, want = found_in[spec.name][:, :, :-1], expected_in[spec.name][:, :, :-1]
        assert relative_error(got, want) < TOLERANCE, f"{spec.name} was not written in place"


def test_loads_in_a_fresh_process(compiled):
    program, run, folder = compiled
    program.save(folder)
    inputs = inputs_for(program, 1, 1, 12)
    torch.save(inputs, folder / "inputs.pt")
    subprocess.run([sys.executable, "-P", "-c", LOAD, str(folder)], check=True, timeout=120)
    assert torch.equal(torch.load(folder / "outputs.pt")[0], run(inputs)[0])


def distance(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_bfloat16_is_no_worse_than_eager(tmp_path):
    """Rounding is amplified by these random weights, so both are held against float32, not against each other."""
    exact, program = program_of("llama", "fp32"), program_of("llama", "bf16")
    run = BACKEND.compile(program, Target.parse("cpu"), tmp_path, quiet)
    for batch, sequence, keys in SIZES:
        inputs = inputs_for(program, batch, sequence, keys)
        eager_in, compiled_in = ({name: t.clone() for name, t in inputs.items()} for _ in range(2))
        exact_in = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
        truth, eager, found = exact(**exact_in)[0], program(**eager_in)[0], run(compiled_in)[0]
        assert found.dtype == torch.bfloat16
        assert distance(found, truth) <= 1.5 * distance(eager, truth), (batch, sequence, keys)
        for spec in program.contract.state:
            want, got, plain = (t[spec.name][:, :, :-1] for t in (exact_in, compiled_in, eager_in))
            assert distance(got, want) <= 1.5 * distance(plain, want) + 1e-6, spec.name


def test_plain_module(tmp_path):
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    program = capture(module, (torch.randn(3, 16),))
    run = BACKEND.compile(program, Target.parse("cpu"), tmp_path, quiet)
    for rows in (1, 2, 9):
        tensors = {program.contract.inputs[0].name: torch.randn(rows, 16)}
        assert relative_error(run(tensors)[0], program(**tensors)[0]) < 2e-4
