"""Split: a program that a backend takes in part runs as parts; another backend compiles what the first leaves out.

    run, left = compile_parts(program, target, tvm, inductor)
    outputs = run(inputs)                      # the contract's inputs in order
    left                                       # {"conv2d_3": "the TVM backend has no fast kernel for conv2d"}

A program that the backend takes wholly is handed over as it is: there is no cut, and none costs anything. What is left
out is decided node by node; a part that is too small to be worth a cut, or that the backend refuses when it compiles
it, joins the rest with that as the reason.

Memory that the program writes in place is seen by one backend only. All nodes that read or write it, or a view of it,
are left out and keep their order, so no write is lost in a copy. Where a view of such memory goes from part to part,
those parts run eagerly, since compiled code may hand over a copy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphwright.backend import Backend, JustInTimeBackend
from graphwright.clean import written
from graphwright.errors import BackendError
from graphwright.partition import Part, partition, too_small
from graphwright.program import Program
from graphwright.target import Target

SMALLEST = 4
"""Nodes below which a part without a weight matrix is not worth two more calls for each run."""

Run = Callable[[Sequence[Any]], Any]
"""Takes a contract's inputs in order, and returns its outputs."""


@dataclass(frozen=True)
class _Step:
    """A compiled part: the values that it takes and makes, and whether it must have them densely."""

    run: Run
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    densely: bool


def compile_parts(
    program: Program, target: Target, backend: Backend, rest: JustInTimeBackend
) -> tuple[Run, dict[str, str]]:
    """Compiles what `backend` takes with it, and what it leaves out with `rest`.

    Args:
        program: what to compile; it may write its inputs in place.
        target: the machine.
        backend: also compiles in this process.
        rest: takes every node.

    Returns:
        A callable over the contract's inputs in order, and the nodes that `backend` did not take, by name, each with
        the reason.

    Raises:
        BackendError: `backend` compiles ahead of time only, or `rest` refuses a part.
    """
    if not isinstance(backend, JustInTimeBackend):
        raise BackendError(f"Backend {backend.name} compiles ahead of time only", fix="Use graphwright.compile")
    left = obstacles(program, target, backend)
    if not left:
        return backend.jit(program), {}
    try:
        parts, left = plan(program, left, backend.name)
    except BackendError as error:  # a value that cannot go from part to part
        return rest.jit(program), dict.fromkeys(_tensor_calls(program), str(error))
    changing = {node.name for node in written(program.module) if node.op != "placeholder"}
    steps = []
    for part in parts:
        run, reason = _compiled(part, backend, rest, changing)
        left |= dict.fromkeys(part.nodes, reason) if reason else {}
        contract = part.program.contract
        steps.append(_Step(run, contract.names, contract.outputs, not _receives_views(part, changing)))
    return _InOrder(tuple(steps), program.contract.names, program.contract.outputs), left


def obstacles(program: Program, target: Target, backend: Backend) -> dict[str, str]:
    """The nodes that a backend does not take, by name, each with the reason."""
    changing = written(program.module)
    found = {}
    for node in program.calls():
        support = backend.supports(node, target)
        touches = [one for one in (node, *node.all_input_nodes) if one in changing]
        if not support.ok:
            found[node.name] = support.reason
        elif touches and isinstance(node.meta.get("val"), Tensor):
            found[node.name] = f"it touches memory of {touches[-1].name}, which the program writes in place"
    return found


def plan(program: Program, left: Mapping[str, str], name: str) -> tuple[list[Part], dict[str, str]]:
    """The parts in order, and the nodes that stay out of those that the backend called `name` takes.

    Raises:
        BackendError: a value that two parts share cannot go from one to the other.
    """
    reasons = dict(left)

    def taken(node: fx.Node) -> bool:
        return node.name not in reasons

    while True:
        parts = partition(program, taken)
        small = [part for part in parts if too_small(part, parts, SMALLEST)]
        if not small:
            return parts, reasons
        for part in small:
            why = f"{name} takes it, but its part of {len(part.nodes)} between nodes that stay out is too small"
            reasons.update(dict.fromkeys(part.nodes, why))


def _tensor_calls(program: Program) -> list[str]:
    return [node.name for node in program.calls() if isinstance(node.meta.get("val"), Tensor)]


def _compiled(part: Part, backend: JustInTimeBackend, rest: JustInTimeBackend, changing: set[str]) -> tuple[Run, str]:
    """A part as a callable, and why `backend` refused it though it takes every node of it."""
    reason = ""
    if part.taken:
        try:
            return backend.jit(part.program), ""
        except BackendError as error:
            reason = str(error)
    if _receives_views(part, changing) or _makes_views(part, changing):
        return lambda arguments: part.program.module(*arguments), reason
    for node in part.program.graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta["val"].contiguous()
    return rest.jit(part.program), reason


def _receives_views(part: Part, changing: set[str]) -> bool:
    """Whether a view of memory that is written in place comes from another part."""
    return any(source in changing for source in part.sources)


def _makes_views(part: Part, changing: set[str]) -> bool:
    """Whether a view of memory that is written in place goes to another part, or out of the program."""
    outputs: Any = part.program.graph.output_node().args[0]
    return any(isinstance(node, fx.Node) and node.name in changing for node in outputs)


@dataclass(frozen=True)
class _InOrder:
    """Runs compiled parts one after the other."""

    steps: tuple[_Step, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of the whole program."""
        values = dict(zip(self.names, arguments, strict=True))
        for step in self.steps:
            given = [values[name] for name in step.inputs]
            made = step.run([value.contiguous() for value in given] if step.densely else given)
            values |= zip(step.outputs, made, strict=True)
        return tuple(values[name] for name in self.outputs)
