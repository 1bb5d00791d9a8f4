"""Cutting a program into parts: nothing is lost, nothing runs too early, and the numbers stay what they were."""

import functools

import pytest
import torch
from families.cache import captured
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.capture import capture
from graphwright.errors import BackendError
from graphwright.feeding import token_inputs
from graphwright.manager import PassManager, plan_passes
from graphwright.ops import attention, rms_norm
from graphwright.partition import Part, assign_levels, partition
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.target import Target


@functools.cache
def cached(family: str) -> Program:
    _, program = captured(family)
    recipe = Recipe.load({"passes": ["merge_linear", "static_cache", "select_logits"]})
    return PassManager(Context(Target.parse("cpu")), verify=False).run(program, plan_passes(recipe, program))


def run(parts: list[Part], program: Program, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    values = dict(tensors)
    for part in parts:
        made = part.program(**{name: values[name] for name in part.program.contract.names})
        values |= dict(zip(part.program.contract.outputs, made, strict=True))
    return [values[name] for name in program.contract.outputs]


def check(program: Program, parts: list[Part]) -> None:
    """Every call once, and the same numbers and states as the whole."""
    tensor_calls = [n.name for n in program.calls() if not isinstance(n.meta["val"], torch.SymInt)]
    assert sorted(name for part in parts for name in part.nodes) == sorted(tensor_calls)
    for length in (5, 1):
        ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))
        mine, theirs = (token_inputs(program, ids) for _ in range(2))
        expected = program(**mine)
        for found, one in zip(run(parts, program, theirs), expected, strict=True):
            assert torch.equal(found, one)
        for spec in program.contract.state:
            assert torch.equal(theirs[spec.name], mine[spec.name])


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["llama", "mixtral"]), st.integers(0, 1 << 30), st.sampled_from([0.05, 0.5, 0.95]))
def test_any_choice_of_nodes_computes_the_same(family: str, seed: int, share: float) -> None:
    program = cached(family)
    generator = torch.Generator().manual_seed(seed)
    chosen = {n.name for n in program.calls() if torch.rand((), generator=generator) < share}
    parts = partition(program, lambda node: node.name in chosen)
    for part in parts:
        assert {name in chosen for name in part.nodes if not name.startswith("getitem")} <= {part.taken}
    check(program, parts)


def test_kinds_alternate_and_there_are_no_more_parts_than_changes() -> None:
    program = cached("llama")
    parts = partition(program, lambda node: node.target is not attention.target)
    assert [part.taken for part in parts] == [True, False, True, False, True]
    assert len(partition(program, lambda _node: True)) == 1
    levels = assign_levels(program, lambda node: node.target is rms_norm.target)
    for node, level in levels.items():
        assert all(levels[source] <= level for source in node.all_input_nodes if source in levels)
        assert level % 2 == (node.target is rms_norm.target)


def test_one_part_has_the_contract_of_the_whole() -> None:
    program = cached("llama")
    (part,) = partition(program, lambda _node: True)
    assert part.program.contract.names == program.contract.names
    assert part.program.contract.outputs == program.contract.outputs
    assert part.sizes == {}
    check(program, [part])


def test_a_write_is_read_after_it() -> None:
    """Attention reads the cache that an update of another part has written."""
    program = cached("llama")
    parts = partition(program, lambda node: "kv_cache_update" in str(node.target))
    check(program, parts)
    assert sum(part.taken for part in parts) == 2  # one in each layer


class Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        return torch.tanh(rows) + torch.tanh(rows * 2)


def test_sizes_without_a_name_get_one() -> None:
    program = capture(Flat(), {"x": torch.randn(3, 4, 5)}, dims={"x": {0: "batch", 1: "sequence"}})
    first, second = partition(program, lambda node: "tanh" in str(node.target) or "mul" in str(node.target))[:2]
    assert second.taken
    assert not first.taken
    assert {name: str(size) for name, size in second.sizes.items()} == {"size_0": "batch*sequence"}
    assert [spec.shape for spec in second.program.contract.inputs] == [("size_0", 5)]
    dim = second.program.contract.dim("size_0")
    assert dim.max == program.contract.dim("batch").max * program.contract.dim("sequence").max
    x = torch.randn(2, 7, 5)
    assert torch.equal(
        run(partition(program, lambda n: "tanh" in str(n.target)), program, {"x": x})[0], program(x=x)[0]
    )


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, x


def test_an_output_that_is_an_input_is_refused() -> None:
    program = capture(Same(), {"x": torch.randn(3, 5)})
    with pytest.raises(BackendError, match="is no value of its own"):
        partition(program, lambda _node: True)
