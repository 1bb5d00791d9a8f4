"""The pattern language: orders, options, constants, shared parts, and reasons for what does not match."""

import torch
from torch import fx

from graphwright.capture import capture
from graphwright.match import Const, Match, NoMatch, Var, call, either, match, maybe_cast

aten = torch.ops.aten


def root_of(function, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> fx.Node:
    class Wrapped(torch.nn.Module):
        def forward(self, x, y):
            return function(x, y)

    x, y = (torch.randn(shape).to(dtype) for shape in (*shapes, (3, 4), (3, 4))[:2])
    program = capture(Wrapped(), {"x": x, "y": y}, dims={})
    return program.graph.output_node().args[0][0]


def test_addition_matches_in_either_order():
    pattern = Var("a") + call(aten.relu.default, Var("b"))
    for function in (lambda x, y: x + y.relu(), lambda x, y: y.relu() + x):
        found = match(pattern, root_of(function))
        assert isinstance(found, Match)
        assert (found["a"].target, found["b"].target) == ("x", "y")


def test_subtraction_does_not():
    assert not match(call(aten.relu.default, Var("a")) - Var("b"), root_of(lambda x, y: x - y.relu()))


def test_constants_are_captured_and_tested():
    found = match(
        Var("a") * Const("factor", lambda c: c > 2), root_of(lambda x, y: x * 3.5 + 0 * y if False else x * 3.5)
    )
    assert isinstance(found, Match)
    assert found["factor"] == 3.5
    assert not match(Var("a") * Const("factor", lambda c: c > 4), root_of(lambda x, y: x * 3.5))


def test_a_shared_variable_is_one_node():
    pattern = Var("a") * call(aten.sigmoid.default, Var("a"))
    assert match(pattern, root_of(lambda x, y: x * x.sigmoid()))
    missed = match(pattern, root_of(lambda x, y: x * y.sigmoid()))
    assert isinstance(missed, NoMatch)


def test_optional_cast():
    pattern = maybe_cast(call(aten.relu.default, Var("a")))
    assert match(pattern, root_of(lambda x, y: x.relu()))
    assert match(pattern, root_of(lambda x, y: x.relu().to(torch.float64)))


def test_alternatives():
    pattern = either(call(aten.relu.default, Var("a")), call(aten.tanh.default, Var("a")))
    assert match(pattern, root_of(lambda x, y: x.tanh()))
    assert not match(pattern, root_of(lambda x, y: x.sigmoid()))


def test_unmentioned_arguments_must_be_default():
    plain = call(aten.gelu.default, Var("a"))
    gelu = torch.nn.functional.gelu
    assert match(plain, root_of(lambda x, y: gelu(x)))
    assert not match(plain, root_of(lambda x, y: gelu(x, approximate="tanh")))
    assert match(
        call(aten.gelu.default, Var("a"), approximate="tanh"), root_of(lambda x, y: gelu(x, approximate="tanh"))
    )


def test_a_failure_says_where_it_stopped_and_why():
    pattern = Var("a") * call(aten.rsqrt.default, call(aten.mean.dim, Var("b"), [-1], True))
    missed = match(pattern, root_of(lambda x, y: x * y.sum(-1, keepdim=True).rsqrt()))
    assert isinstance(missed, NoMatch)
    assert missed.node.target is aten.sum.dim_IntList
    assert "expected mean.dim, found sum.dim_IntList" in missed.reason
    assert missed.matched == 2
