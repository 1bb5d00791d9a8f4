"""Programs that one backend takes in part: the same numbers, in place too, each node left out with its reason."""

import pytest
import torch
from torch import nn

from graphwright.backend import Support
from graphwright.backends.inductor import BACKEND as INDUCTOR
from graphwright.capture import capture
from graphwright.clean import written
from graphwright.dynamo import _program, _to_aten
from graphwright.errors import BackendError
from graphwright.numerics import relative_error
from graphwright.program import Program
from graphwright.split import compile_parts, obstacles
from graphwright.target import Target
from graphwright.text import op_name

CPU = Target.parse("cpu")


class Picky:
    """A backend that runs graphs as they are, and copies what it returns, but takes no op of some names."""

    name, kinds = "picky", ("cpu",)

    def __init__(self, *refused: str, breaks: bool = False) -> None:
        self.refused, self.breaks = refused, breaks
        self.compiled: list[list[str]] = []

    def supports(self, node, target):
        name = op_name(node.target).partition(".")[0]
        return Support(name not in self.refused, f"no kernel for {name}" if name in self.refused else "")

    def jit(self, program: Program):
        if self.breaks:
            raise BackendError("Picky breaks down")
        self.compiled.append([op_name(node.target).partition(".")[0] for node in program.calls()])
        return lambda arguments: tuple(output.clone() for output in program.module(*arguments))


class Between(nn.Module):
    """Two layers with something in between that a backend may not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.first(x).relu().cumsum(-1).transpose(0, 1).sin())


def between() -> tuple[Program, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module, x = Between().eval(), torch.randn(3, 5, 8)
    return capture(module, (x,)), x, module(x).detach()


def region(function, *arguments) -> Program:
    """What dynamo would hand over for a function."""
    graphs = []

    def keep(module, _examples):
        def build(*given):
            graphs.append(_program(_to_aten(module, given)))
            return module(*given)

        return build

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(*(argument.clone() for argument in arguments))
    return graphs[0]


def test_a_program_that_is_taken_wholly_is_not_cut():
    program, x, expected = between()
    backend = Picky()
    run, left = compile_parts(program, CPU, backend, Picky())
    assert not left
    assert len(backend.compiled) == 1
    assert relative_error(run([x])[0], expected) < 1e-6


@pytest.mark.parametrize("rest", [Picky(), INDUCTOR], ids=["eager", "inductor"])
def test_what_is_left_out_goes_to_the_other_backend(rest):
    """Through Inductor, values with strides of their own cross the cut."""
    program, x, expected = between()
    backend = Picky("cumsum")
    run, left = compile_parts(program, CPU, backend, rest)
    assert left == {"cumsum": "no kernel for cumsum"}
    assert [("linear" in ops) for ops in backend.compiled] == [True, True]
    assert relative_error(run([x])[0], expected) < 1e-6


def test_a_small_part_joins_the_rest():
    program, x, expected = between()
    backend = Picky("linear", "cumsum")
    run, left = compile_parts(program, CPU, backend, Picky())
    assert not backend.compiled
    assert "its part of 1 between nodes that stay out is too small" in left["relu"]
    assert relative_error(run([x])[0], expected) < 1e-6


def test_a_part_that_the_backend_refuses_after_all_is_left_out_with_what_it_said():
    program, x, expected = between()
    run, left = compile_parts(program, CPU, Picky("cumsum", breaks=True), Picky())
    assert "Picky breaks down" in left["linear"]
    assert left["cumsum"] == "no kernel for cumsum"
    assert relative_error(run([x])[0], expected) < 1e-6


def test_what_cannot_cross_a_cut_is_left_out_wholly():
    class Same(nn.Module):
        def forward(self, x):
            return x, x.sin().exp().cos().tanh().cumsum(0)

    x = torch.randn(3, 4)
    program = capture(Same(), (x,))
    run, left = compile_parts(program, CPU, Picky("cumsum"), Picky())
    assert len(left) == 5
    assert all("is no value of its own" in reason for reason in left.values())
    assert relative_error(run([x])[1], Same()(x)[1]) < 1e-6


def write_and_read(cache, x, places):
    """A write after a read of the old values, through a view, and a read of the new ones; sums in between."""
    old = cache[:, :2]
    before = old.sum(1) * 1
    new = (x.sin() * 2 + 1).exp().cos()
    cache.index_copy_(1, places, new)
    after = old + cache[:, 2:]
    return before.tanh() * 3 + 1, (after.tanh() * 3 + 1).sigmoid().exp()


@pytest.mark.parametrize("rest", [Picky(), INDUCTOR], ids=["eager", "inductor"])
def test_memory_that_is_written_in_place_stays_right(rest):
    cache, x, places = torch.randn(3, 4), torch.randn(3, 2), torch.tensor([1, 3])
    program = region(write_and_read, cache, x, places)
    backend = Picky("index_copy_")
    run, left = compile_parts(program, CPU, backend, rest)
    assert backend.compiled, "what touches no such memory is taken"
    changing = {node.name for node in written(program.module)}
    for node in program.calls():
        touches = any(source.name in changing for source in node.all_input_nodes)
        assert not touches or node.name in left
    mine, theirs = cache.clone(), cache.clone()
    expected = write_and_read(theirs, x, places)
    given = {"cache": mine, "x": x, "places": places}
    found = run([given[name.removeprefix("L_").removesuffix("_")] for name in program.contract.names])
    assert torch.equal(mine, theirs)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6


def test_the_reason_names_the_memory():
    program = region(write_and_read, torch.randn(3, 4), torch.randn(3, 2), torch.tensor([1, 3]))
    reasons = obstacles(program, CPU, Picky("index_copy_"))
    assert "no kernel for index_copy_" in reasons.values()
    assert any("which the program writes in place" in reason for reason in reasons.values())


def test_a_backend_that_compiles_ahead_of_time_only_is_refused():
    program, *_ = between()
    with pytest.raises(BackendError, match="ahead of time only"):
        compile_parts(program, CPU, object.__new__(type("Ahead", (), {"name": "ahead"})), Picky())
