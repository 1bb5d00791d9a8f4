"""The editor and the driver of rules: the only place that edits graphs on behalf of passes.

    with Editor(program, origin="rope") as editor:
        new = editor.call(rope, x, positions, before=node)      # shapes are computed, provenance is noted
        editor.replace(node, new)                               # counted; dead code goes at the end

The editor finishes on every way out: dead code removed, graph linted, module recompiled. `rewrites` is what the
driver offers for local rules: it tries a rule at each node, checks each replacement against the nodes it replaces
on random numbers, and reports sites and near misses.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import clean, shapes
from graphwright.contract import Dim, InputSpec, StateSpec
from graphwright.errors import PassError
from graphwright.match import Match, NoMatch, Pattern, match
from graphwright.op import Op
from graphwright.program import Program, attribute
from graphwright.serialize import set_attribute
from graphwright.shapes import compute, mode_of
from graphwright.text import op_name

COLLECT_BYTES = 1 << 26
"""Weights that are replaced before Python is asked to look for what holds them in cycles."""


@dataclass(frozen=True)
class Site:
    """One place that a pass changed."""

    node: str
    """Name of the node that was replaced."""
    note: str = ""


class Fuel:
    """How many rewrites may still happen; bisect gives less and less of it (LLVM's opt-bisect)."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0
        self.last = ""

    @property
    def empty(self) -> bool:
        """Whether a limit was set and is reached."""
        return self.limit is not None and self.used >= self.limit

    def take(self, what: str) -> bool:
        """Spends one unit, or says that none is left."""
        if self.empty:
            return False
        self.used += 1
        self.last = what
        return True


class Editor:
    """Edits one program's graph in place and leaves it clean."""

    def __init__(self, program: Program, origin: str, fuel: Fuel | None = None) -> None:
        self.program = program
        self.origin = origin
        self.fuel = fuel or Fuel()
        self.sites: list[Site] = []
        self._mode = mode_of(program.graph)
        self._retired_bytes = 0

    def __enter__(self) -> "Editor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.program.graph.eliminate_dead_code(is_impure_node=clean.is_impure)
        if kind is None:
            self.program.graph.lint()
        drop_unused_weights(self.program)
        self.program.module.recompile()

    def allow(self, node: fx.Node) -> bool:
        """Whether there is fuel for one more rewrite, at `node`."""
        return self.fuel.take(f"{self.origin} at {node.name}")

    def call(self, target: Op | Callable[..., Any], *args: Any, before: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call node just before `before`, with its shape computed and its origin noted."""
        overload = target.target if isinstance(target, Op) else target
        with self.program.graph.inserting_before(before):
            node = self.program.graph.call_function(overload, args, kwargs)
        node.meta["val"] = compute(node, self._mode, self.program.module)
        node.meta["origin"] = self.origin
        for key in ("stack_trace", "nn_module_stack"):
            if key in before.meta:
                node.meta[key] = before.meta[key]
        return node

    def weight(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """Stores `tensor` under a free name derived from `name` and reads it just before `before`."""
        free = self._free_name(name)
        set_attribute(self.program.module, free, tensor.detach())
        return self.read(free, before)

    def read(self, name: str, before: fx.Node) -> fx.Node:
        """A node that reads the weight called `name` just before `before`."""
        with self.program.graph.inserting_before(before):
            node = self.program.graph.create_node("get_attr", name)
        node.meta["val"] = compute(node, self._mode, self.program.module)
        node.meta["origin"] = self.origin
        return node

    def set_weight(self, node: fx.Node, position: int, tensor: Tensor, name: str = "weight") -> None:
        """Lets the call `node` read `tensor` as its argument at `position`; other readers keep the old weight.

        Args:
            node: a call.
            position: of an argument that is a weight or None.
            tensor: the new weight; where there was one, of its shape and dtype.
            name: what to call a weight where there was none.
        """
        current = node.args[position]
        if isinstance(current, fx.Node):
            name = str(current.target)
            same = [n for n in self.program.graph.nodes if n.op == "get_attr" and n.target == name]
            if sum(user.all_input_nodes.count(n) for n in same for user in n.users) == 1:
                set_attribute(self.program.module, name, tensor.detach())
                return
        node.update_arg(position, self.weight(name, tensor, before=node))

    def replace(self, node: fx.Node, new: fx.Node, note: str = "") -> None:
        """Lets every user of `node` read `new` instead, and counts a site."""
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.sites.append(Site(node.name, note))

    def retire(self, node: fx.Node) -> None:
        """Erases a replaced call at once, with the weights that only it read, so that their memory is free again."""
        sources = node.all_input_nodes
        self.program.graph.erase_node(node)
        for source in sources:
            if source.op == "get_attr" and not source.users:
                self._retired_bytes += self.program.weight(source).nbytes
                self.program.graph.erase_node(source)
        drop_unused_weights(self.program)
        if self._retired_bytes > COLLECT_BYTES:
            # Fake tensors and the closures that made them hold each other, and the weights they stand for.
            gc.collect()
            self._retired_bytes = 0

    def note(self, node: fx.Node, note: str) -> None:
        """Counts a site whose node stays, such as a weight with new values."""
        self.sites.append(Site(node.name, note))

    def _free_name(self, name: str) -> str:
        candidate, count = name, 0
        while True:
            try:
                attribute(self.program.module, candidate)
            except AttributeError:
                return candidate
            count += 1
            candidate = f"{name}_{count}"


def drop_unused_weights(program: Program) -> None:
    """Lets go of tensors and submodules that the graph does not read any more, so that their memory is freed."""
    module, used = program.module, {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    module.delete_all_unused_submodules()
    for prefix, part in list(module.named_modules()):
        for name in [*part._buffers, *part._parameters]:
            if f"{prefix}.{name}".lstrip(".") not in used:
                part._buffers.pop(name, None)
                part._parameters.pop(name, None)


@dataclass(frozen=True)
class Rule:
    """A local rewrite: where `pattern` is found and `check` agrees, `replace` builds what stands there instead.

    `check` returns None, or the reason against it; `replace` returns the new node. Neither keeps anything
    between calls: what they know travels in the match.
    """

    name: str
    pattern: Pattern
    replace: Callable[[Editor, Match], fx.Node]
    check: Callable[[Match], str | None] = lambda _found: None


@dataclass
class RuleReport:
    """What rules did, and the best attempt that came to nothing."""

    sites: list[Site] = field(default_factory=list)
    near_misses: list[str] = field(default_factory=list)


def apply_rules(program: Program, rules: tuple[Rule, ...], editor: Editor, roots: set[Any]) -> RuleReport:
    """Tries `rules` in order at every call of one of `roots`; the first that fits rewrites the node."""
    report = RuleReport()
    misses: list[tuple[int, str]] = []
    for node in program.calls(*roots):
        for rule in rules:
            found = match(rule.pattern, node)
            if isinstance(found, NoMatch):
                misses.append((found.matched, f"{rule.name}: {found.reason} at {found.node.name}"))
                continue
            reason = rule.check(found)
            if reason is not None:
                misses.append((len(found.nodes), f"{rule.name}: {reason} at {node.name}"))
                continue
            if editor.allow(node):
                editor.replace(node, rule.replace(editor, found), note=rule.name)
            break
    report.sites = editor.sites
    best = sorted(misses, key=lambda miss: -miss[0])[:3]
    report.near_misses = [text for matched, text in best if matched > 1]
    return report


def run_nodes(program: Program, outputs: list[fx.Node], bound: dict[fx.Node, Any]) -> list[Any]:
    """Evaluates `outputs` eagerly, given the values of some nodes; used to learn what a subgraph means.

    Raises:
        PassError: an output depends on a placeholder that is not bound.
    """
    values = dict(bound)
    needed = _needed(outputs, bound)
    last_use = {source: node for node in needed for source in node.all_input_nodes}
    for node in needed:
        if node.op == "placeholder":
            raise PassError(f"{outputs[0].name} depends on the input {node.target}, which has no value here")
        if node.op == "get_attr":
            values[node] = program.weight(node)
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
        for source in node.all_input_nodes:
            if last_use[source] is node and source not in outputs:
                values.pop(source)  # masks of long sequences are large
    return [values[node] for node in outputs]


def _needed(outputs: list[fx.Node], bound: dict[fx.Node, Any]) -> list[fx.Node]:
    """Ancestors of `outputs` in graph order, stopping at bound nodes."""
    needed: set[fx.Node] = set()
    stack = [node for node in outputs if node not in bound]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        stack.extend(source for source in node.all_input_nodes if source not in bound)
    return [node for node in outputs[0].graph.nodes if node in needed]


def extend_contract(
    program: Program,
    *,
    inputs: tuple[InputSpec, ...] = (),
    state: tuple[StateSpec, ...] = (),
    dims: tuple[Dim, ...] = (),
    drop: tuple[str, ...] = (),
) -> dict[str, fx.Node]:
    """Adds inputs and state to `program` in place, and drops inputs and state that nothing reads any more.

    New dimensions become symbols of the graph's shapes.

    Returns:
        All placeholders by name.
    """
    contract, graph = program.contract, program.graph
    nodes = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    for name in drop:
        graph.erase_node(nodes.pop(name))
    kept = tuple(spec for spec in contract.inputs if spec.name not in drop)
    held = tuple(spec for spec in contract.state if spec.name not in drop)
    program.contract = contract.with_(inputs=kept + inputs, state=held + state, dims=contract.dims + dims)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for spec in (*inputs, *state):
        with graph.inserting_before(first):
            nodes[spec.name] = graph.placeholder(spec.name)
    for name in program.contract.names:
        first.prepend(nodes[name])
    mode = shapes.mode_of(graph)
    if isinstance(mode, shapes.ContractMode):
        for spec in (*inputs, *state):
            nodes[spec.name].meta["val"] = mode.placeholder(spec, program.contract)
    elif inputs or state:
        shapes.propagate(program.module, program.contract)
    return nodes


def describe(node: fx.Node) -> str:
    """A node for an error message: op, name, and the line of the model it came from."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
    source = f" ({lines[-1]})" if lines else ""
    return f"{op_name(node.target)} {node.name}{source}"
