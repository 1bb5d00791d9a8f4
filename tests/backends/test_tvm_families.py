"""Programs of every dense causal family, lowered by TVM, against the eager program over the same quantized weights."""

import re
from pathlib import Path

import pytest
import torch
from families.cache import captured
from torch import nn

from graphwright.backend import choose, coverage
from graphwright.backends.inductor import BACKEND as INDUCTOR
from graphwright.backends.tvm import BACKEND, LIBRARY
from graphwright.backends.tvm.executable import TvmExecutable
from graphwright.capture import capture
from graphwright.errors import BackendError
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target

CPU = Target.parse("cpu")
DENSE = [
    "llama", "gpt2", "opt", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_neox", "falcon",
    "falcon_alibi", "falcon_grouped", "bloom",
]  # fmt: skip

DISPATCHED = {"passes": ["merge_linear", "static_cache", "select_logits"]}
"""Leaves mixtures of experts as products of sorted rows."""

GATHERED = {"passes": [*DISPATCHED["passes"], "experts"]}


def rewritten(name: str, recipe: str | dict = "int8-dynamic") -> Program:
    """A tiny family's program after a recipe."""
    _, program = captured(name)
    return PassManager(Context(CPU), verify=False).run(program, plan_passes(Recipe.load(recipe), program))


def lowered(program: Program, directory: Path):
    """The executable of a program and the program as it was lowered."""
    prepared = BACKEND.prepare(program, CPU)
    return BACKEND.compile(prepared, CPU, directory, lambda _text, _fraction: None), prepared


def distance(executable, program: Program, sizes: dict[str, int], seed: int = 0) -> float:
    """Relative distance of outputs and of state after one call with random inputs."""
    inputs = program.contract.draw(sizes, seed)
    states = [program.contract.allocate(sizes) for _ in range(2)]
    found, expected = executable({**inputs, **states[0]}), program(**inputs, **states[1])
    # The last slot of a cache is scratch.
    pairs = [*zip(found, expected, strict=True)]
    pairs += [(a[:, :, :-1], b[:, :, :-1]) for a, b in zip(states[0].values(), states[1].values(), strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("recipe", ["fp32", "int4", "int8"])
def test_floating_point_activations_equal_the_eager_program(name, recipe, tmp_path):
    program = rewritten(name, recipe)
    assert not coverage(program, BACKEND, CPU).fallbacks
    executable, program = lowered(program, tmp_path)
    for sizes in (
        {"batch": 1, "sequence": 1, "keys": 1, "capacity": 16, "logits": 1},
        {"batch": 2, "sequence": 9, "keys": 11, "capacity": 16, "logits": 2},
    ):
        assert distance(executable, program, sizes) < 1e-5


@pytest.mark.parametrize("name", DENSE)
def test_families_equal_the_eager_program(name, tmp_path):
    program = rewritten(name)
    assert not coverage(program, BACKEND, CPU).fallbacks
    executable, program = lowered(program, tmp_path)
    for sizes in (
        {"batch": 1, "sequence": 1, "keys": 1, "capacity": 16, "logits": 1},
        {"batch": 2, "sequence": 5, "keys": 7, "capacity": 16, "logits": 2},
        {"batch": 3, "sequence": 1, "keys": 9, "capacity": 16, "logits": 1},
    ):
        # A last bit that differs may round one activation to the next code, which is one part in 127 of the largest.
        assert distance(executable, program, sizes) < 2e-2


@pytest.mark.parametrize("recipe", ["int4-dynamic", "int8-dynamic"])
def test_steps_equal_one_forward(recipe, tmp_path):
    program = rewritten("llama", recipe)
    executable, program = lowered(program, tmp_path)
    tokens = torch.randint(0, 128, (1, 9), generator=torch.Generator().manual_seed(0))
    sizes = {"batch": 1, "capacity": 16}

    def call(state, start: int, end: int) -> torch.Tensor:
        inputs = {
            "input_ids": tokens[:, start:end].contiguous(),
            "positions": torch.arange(start, end)[None],
            "key_positions": torch.arange(end),
            "logit_index": torch.tensor([[end - start - 1]]),
        }
        return executable({**inputs, **state})[0]

    whole = call(program.contract.allocate(sizes), 0, 9)
    state = program.contract.allocate(sizes)
    call(state, 0, 5)
    for place in range(5, 9):
        stepped = call(state, place, place + 1)
    assert float((stepped - whole).norm() / whole.norm()) < 2e-2
    assert stepped.argmax() == whole.argmax()


def test_padding_is_never_seen(tmp_path):
    executable, program = lowered(rewritten("llama", "int4-dynamic"), tmp_path)
    sizes = {"batch": 2, "sequence": 4, "keys": 4, "capacity": 8, "logits": 1}
    inputs = program.contract.draw(sizes)
    inputs["positions"] = torch.tensor([[0, 1, 2, 3], [-1, -1, 0, 1]])
    inputs["logit_index"] = torch.tensor([[3], [3]])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][1, :2] = (changed["input_ids"][1, :2] + 1) % 128
    outputs = [executable({**given, **program.contract.allocate(sizes)})[0] for given in (inputs, changed)]
    assert torch.equal(*outputs)


def test_a_dispatch_of_experts_is_left_to_inductor():
    program = rewritten("mixtral", DISPATCHED)
    chosen, passed_over = choose(program, CPU, [BACKEND, INDUCTOR])
    assert chosen is INDUCTOR
    assert re.search("has no kernel for|has no fast kernel for|cannot convert", passed_over["tvm"])


def test_what_it_cannot_lower_is_named():
    _, passed_over = choose(rewritten("llama", "bf16"), CPU, [BACKEND, INDUCTOR])
    assert "computes in float32" in passed_over["tvm"]


@pytest.mark.parametrize(
    ("codes", "weights", "taken"), [(32, 32, True), (16, 32, True), (32, 16, False), (0, 32, True)]
)
def test_activations_share_a_step_within_a_group_of_weights_only(codes, weights, taken):
    rounding = {"bits": 4, "group_size": weights, "head_bits": 0}
    recipe = {"passes": ["static_cache", {"rtn": rounding}, {"activations": {"group_size": codes}}]}
    assert (not coverage(rewritten("llama", recipe), BACKEND, CPU).fallbacks) == taken


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 8, 8), "no fast kernel for conv2d"),
        (nn.LayerNorm((5, 6)), (2, 5, 6), "more than the last dimension"),
        (nn.Linear(4, 3).double(), (2, 4), "computes in float32"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_plain_modules_that_it_declines(module, shape, reason):
    program = capture(module, (torch.randn(shape, dtype=next(module.parameters()).dtype),))
    program = PassManager(Context(CPU), verify=False).run(program, plan_passes(Recipe.load("none"), program))
    chosen, passed_over = choose(program, CPU, [BACKEND, INDUCTOR])
    assert chosen is INDUCTOR
    assert reason in passed_over["tvm"]


def test_a_forced_backend_refuses_with_the_node(tmp_path):
    with pytest.raises(BackendError, match=r"TVM .*(converter|kernels|take).*"):
        lowered(rewritten("mixtral", DISPATCHED), tmp_path)


def test_tensors_may_start_anywhere(tmp_path):
    # The table of tokens is read by an operator of TVM's, which loads whole cache lines.
    executable, program = lowered(rewritten("llama", "fp32"), tmp_path)
    sizes = {"batch": 1, "sequence": 19, "keys": 19, "capacity": 32, "logits": 1}
    inputs, state = program.contract.draw(sizes), program.contract.allocate(sizes)
    expected = executable({**inputs, **state})[0]
    shifted = {name: shift(tensor) for name, tensor in inputs.items()}
    weights = {name: shift(weight) for name, weight in program.weights().items()}
    again = TvmExecutable(tmp_path / LIBRARY, ("decode", "general"), program.contract, weights)
    assert torch.equal(again({**shifted, **program.contract.allocate(sizes)})[0], expected)
    with pytest.raises(BackendError, match="does not start at a multiple of 64 bytes"):
        executable({**inputs, **{name: shift(tensor) for name, tensor in state.items()}})


def shift(tensor: torch.Tensor) -> torch.Tensor:
    """An equal tensor that starts 8 bytes behind a cache line."""
    gap = 8 // tensor.element_size()
    space = torch.empty(tensor.numel() + gap, dtype=tensor.dtype)
    space[gap:] = tensor.flatten()
    return space[gap:].view(tensor.shape)


def test_caches_are_checked(tmp_path):
    executable, program = lowered(rewritten("llama"), tmp_path)
    sizes = {"batch": 1, "sequence": 1, "keys": 9, "capacity": 4, "logits": 1}
    inputs, state = program.contract.draw(sizes), program.contract.allocate(sizes)
    with pytest.raises(BackendError, match="caches hold 3"):
        executable({**inputs, **state})
    name = next(iter(state))
    state[name] = state[name].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["key_positions"] = torch.arange(2)
    with pytest.raises(BackendError, match="not contiguous"):
        executable({**inputs, **state})


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *((name, "int4") for name in ("mixtral", "deepseek_v3", "gpt_oss")),
        ("qwen3_moe", "int8"), ("mixtral", "fp32"),
    ],
)  # fmt: skip
def test_mixtures_of_experts_equal_the_eager_program(name, recipe, tmp_path):
    program = rewritten(name, GATHERED if recipe == "fp32" else recipe)
    assert not coverage(program, BACKEND, CPU).fallbacks
    executable, program = lowered(program, tmp_path)
    assert "tiled_experts" in program.text()
    for sizes in (
        {"batch": 1, "sequence": 1, "keys": 1, "capacity": 16, "logits": 1},
        {"batch": 2, "sequence": 9, "keys": 11, "capacity": 16, "logits": 2},
    ):
        assert distance(executable, program, sizes) < 1e-5
