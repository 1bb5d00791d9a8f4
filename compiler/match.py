"""The pattern language: patterns are written as calls of ops and matched against nodes.

    x, weight, eps = Var("x"), Var("weight"), Const("eps")
    wide = maybe_cast(x)
    normed = wide * call(aten.rsqrt.default, call(aten.mean.dim, wide ** 2, [-1], True) + eps)
    pattern = weight * maybe_cast(normed)

    found = match(pattern, node)            # Match, with found["x"], found["eps"]; or NoMatch with a reason

- A `Var` binds a node and must be the same node wherever it occurs; a pattern object used twice likewise.
- A `Const` binds a plain number and may carry a test; it must be equal wherever it occurs.
- Names that start with an underscore may be bound to something else each time.
- `add` and `mul` match in either order. `maybe_cast(p)` matches p with or without a cast around it; `optional(t, p)`
  does so for any one-argument target; `either(p, q)` tries alternatives.
- Arguments that a pattern does not mention must have their default value.

Matching never edits. It walks from the root towards the inputs and backtracks over commutative orders only, so its
time is linear in the pattern's size for all practical patterns. A failure keeps the deepest point it reached, for
the user who asks why a rule did not fire.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.text import op_name

aten = torch.ops.aten

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.logical_and.default, aten.logical_or.default}

Bindings = dict[Any, Any]


class Pattern:
    """Base of all patterns; arithmetic on patterns makes patterns of ATen calls."""

    def __add__(self, other: Any) -> "Pattern":
        return call(aten.add.Tensor, self, other)

    def __radd__(self, other: Any) -> "Pattern":
        return call(aten.add.Tensor, self, other)

    def __mul__(self, other: Any) -> "Pattern":
        return call(aten.mul.Tensor, self, other)

    def __rmul__(self, other: Any) -> "Pattern":
        return call(aten.mul.Tensor, self, other)

    def __sub__(self, other: Any) -> "Pattern":
        return call(aten.sub.Tensor, self, other)

    def __pow__(self, exponent: Any) -> "Pattern":
        return call(aten.pow.Tensor_Scalar, self, exponent)

    def __neg__(self) -> "Pattern":
        return call(aten.neg.default, self)


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """Any node, bound to `name`; `test` may refuse one."""

    name: str
    test: Callable[[fx.Node], bool] | None = None


@dataclass(frozen=True, eq=False)
class Const(Pattern):
    """A plain number, bound to `name`; `test` may refuse one."""

    name: str
    test: Callable[[Any], bool] | None = None


@dataclass(frozen=True, eq=False)
class Call(Pattern):
    """A call of one of `targets`."""

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first of several patterns that matches."""

    choices: tuple[Pattern, ...]


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    """A call of `target`, or of any target in a tuple, with these arguments."""
    return Call(target if isinstance(target, tuple) else (target,), args, kwargs)


def either(*choices: Pattern) -> Either:
    """Alternatives, tried in order."""
    return Either(choices)


def optional(target: Any, inner: Pattern) -> Either:
    """`inner`, or `target(inner)`."""
    return Either((call(target, inner), inner))


def maybe_cast(inner: Pattern) -> Either:
    """`inner`, with or without a change of dtype around it."""
    return Either((call(aten.to.dtype, inner, Const("_dtype")), inner))


@dataclass(frozen=True)
class Match:
    """A pattern found at `root`: bindings by name, and the nodes that the pattern's calls cover."""

    root: fx.Node
    bindings: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str) -> Any:
        """The binding of `name`, None when the pattern's alternative did not mention it."""
        return self.bindings.get(name)


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern was not found: the node where the best attempt stopped, and how far it had come."""

    node: fx.Node
    reason: str
    matched: int

    def __bool__(self) -> bool:
        return False


class _Attempt:
    """One try at one root; remembers the point that covered most nodes."""

    def __init__(self, root: fx.Node) -> None:
        self.best = 0
        self.stop: tuple[fx.Node, Callable[[], str]] = (root, lambda: "nothing matched")

    def fail(self, bindings: Bindings, node: Any, reason: Callable[[], str]) -> None:
        covered = sum(1 for key in bindings if isinstance(key, Call))
        if covered >= self.best and isinstance(node, fx.Node):
            self.best, self.stop = covered, (node, reason)

    def unify(self, pattern: Any, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        """All ways to match `value`, each as the bindings that result."""
        if pattern in bindings if isinstance(pattern, Pattern) else False:
            if bindings[pattern] is value:
                yield bindings
            else:
                self.fail(bindings, value, lambda: "two uses of one part are different nodes")
        elif isinstance(pattern, (Var, Const)):
            yield from self._bind(pattern, value, bindings)
        elif isinstance(pattern, Either):
            for choice in pattern.choices:
                for found in self.unify(choice, value, bindings):
                    yield {**found, pattern: value}
        elif isinstance(pattern, Call):
            yield from self._call(pattern, value, bindings)
        elif isinstance(pattern, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(value) == len(pattern):
                yield from self._sequence(pattern, value, bindings)
        elif isinstance(value, fx.Node):
            self.fail(bindings, value, lambda: f"expected the constant {pattern}")
        elif pattern == value:
            yield bindings

    def _bind(self, pattern: Var | Const, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        is_node = isinstance(value, fx.Node)
        if is_node != isinstance(pattern, Var) or value is None:
            self.fail(
                bindings,
                value,
                lambda: f"{pattern.name} should be a {'node' if not is_node else 'constant'}",
            )
        elif pattern.test is not None and not pattern.test(value):
            self.fail(bindings, value, lambda: f"{pattern.name} was refused")
        elif self._taken(pattern, value, bindings):
            self.fail(bindings, value, lambda: f"{pattern.name} is already bound to another value")
        else:
            yield {**bindings, pattern.name: value}

    @staticmethod
    def _taken(pattern: Var | Const, value: Any, bindings: Bindings) -> bool:
        if pattern.name not in bindings or pattern.name.startswith("_"):
            return False
        held = bindings[pattern.name]
        return held is not value if isinstance(pattern, Var) else bool(held != value)

    def _call(self, pattern: Call, node: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            self.fail(bindings, node, lambda: f"expected {_names(pattern)}, found a {node.op}")
            return
        if node.target not in pattern.targets:
            self.fail(bindings, node, lambda: f"expected {_names(pattern)}, found {op_name(node.target)}")
            return
        arguments = aligned(node, len(pattern.args), pattern.kwargs)
        if arguments is None:
            self.fail(
                bindings,
                node,
                lambda: f"{op_name(node.target)} has arguments that the pattern leaves at default",
            )
            return
        positional, named = arguments
        covered = {**bindings, pattern: node}
        wanted = [*pattern.args, *pattern.kwargs.values()]
        orders = [positional]
        if node.target in COMMUTATIVE:
            orders.append([positional[1], positional[0], *positional[2:]])
        for order in orders:
            yield from self._sequence(wanted, [*order, *named], covered)

    def _sequence(self, patterns: Sequence[Any], values: Sequence[Any], bindings: Bindings) -> Iterator[Bindings]:
        if not patterns:
            yield bindings
            return
        for found in self.unify(patterns[0], values[0], bindings):
            yield from self._sequence(patterns[1:], values[1:], found)


def match(pattern: Pattern, root: fx.Node) -> Match | NoMatch:
    """Matches `pattern` with its outermost call at `root`."""
    attempt = _Attempt(root)
    for found in attempt.unify(pattern, root, {}):
        named = {key: value for key, value in found.items() if isinstance(key, str)}
        nodes = tuple(value for key, value in found.items() if isinstance(key, Call))
        return Match(root, named, nodes)
    node, reason = attempt.stop
    return NoMatch(node, reason(), attempt.best)


def aligned(node: fx.Node, positional: int, named: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """The first `positional` arguments and those called `named`; None if any other is not at its default."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return ([*node.args], []) if len(node.args) == positional and not node.kwargs else None
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    first, rest = [], {}
    for index, argument in enumerate(schema.arguments):
        value = given.get(argument.name, argument.default_value if argument.has_default_value() else None)
        if index < positional:
            first.append(value)
        else:
            rest[argument.name] = (value, argument)
    for name, (value, argument) in rest.items():
        default = argument.default_value if argument.has_default_value() else None
        if name not in named and name not in IGNORED_ARGUMENTS and value != default:
            return None
    return first, [rest[name][0] for name in named]


IGNORED_ARGUMENTS = {"device", "layout", "pin_memory", "memory_format"}
"""Arguments that say where a tensor lives, not what it holds."""


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a call by its schema name, wherever it was written; its default when left out."""
    schema = node.target._schema
    for index, formal in enumerate(schema.arguments):
        if formal.name == name:
            if index < len(node.args):
                return node.args[index]
            fallback = formal.default_value if formal.has_default_value() else default
            return node.kwargs.get(name, fallback)
    raise KeyError(name)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by their schema names, defaults of those left out included."""
    known = node.target._schema.arguments
    given = {a.name: value for a, value in zip(known, node.args, strict=False)}
    return {**{a.name: a.default_value for a in known if a.has_default_value()}, **given, **node.kwargs}


def _names(pattern: Call) -> str:
    return " or ".join(op_name(target) for target in pattern.targets)
