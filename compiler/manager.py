"""The pass manager: orders a recipe's passes, runs them, and checks each one's promises.

    plan = plan_passes(recipe, program)             # raising first, then the recipe's passes in a legal order
    rewritten = PassManager(context).run(program, plan)

After each pass the graph is cleaned and linted, what the pass says it provides is looked for, and

- an `exact` pass must leave the outputs equal within the tolerance of their dtype, on drawn inputs of several sizes;
  where bfloat16 or float16 rounds more than that, the same two programs are compared in float32;
- an `approximate` pass has its error measured, against the recipe's budget if there is one;
- a `structural` pass that changes the contract brings its own comparison (`Pass.verify`).

A failure names the pass, the first node whose value differs, and how to reproduce it.
"""

import difflib
import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import Tensor

from graphwright import clean, numerics, registry, text
from graphwright.errors import (
    BudgetError,
    GraphwrightError,
    PassError,
    RecipeError,
    VerificationError,
)
from graphwright.feeding import batch_inputs, logits_in_chunks
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import PassRecord, Program
from graphwright.recipe import Budget, Recipe
from graphwright.rewrite import describe
from graphwright.widening import NARROW, widened

RAISING = f"{registry.PASSES}.raise_."

VERIFY_SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 2, "sequence": 7},
    {"batch": 1, "sequence": 1, "keys": 1, "logits": 1},
)
"""Sizes at which exact passes are compared: odd and padded, and a single token."""

MEASURED = 4
"""Calibration batches on which an approximate pass's divergence is measured: it takes two forwards over each."""

STREAMED_CHUNK = 32
"""Tokens that enter caches at a time while a pass over caches is measured; a decode step for each would take long."""

Observer = Callable[[PassRecord, Program, Program], None]
"""Called after each pass with its record, the program before and the program after."""


def plan_passes(recipe: Recipe, program: Program | None = None) -> list[Pass]:
    """All passes to run, raising included, in an order that satisfies requires, after and recipe order.

    Approximate passes run in the order in which the recipe lists them. Others, which do not change what the program
    computes, are put where they are needed.

    Raises:
        RecipeError: a cycle, a requirement nobody provides, two passes that exclude each other, or two approximate
            ones that are listed in an order that cannot be; both sides are named.
    """
    done = {record.name for record in program.history} if program else set()
    raising = [registry.pass_class(n)() for n, m in registry.pass_files().items() if m.startswith(RAISING)]
    passes = [p for p in (*raising, *recipe.passes) if p.name not in done or p in recipe.passes]
    held = {prop for name in done for prop in registry.pass_class(name).provides}
    _complete(passes, held)
    _refuse_conflicts(passes, held)
    return _order(passes, recipe.passes)


def _complete(passes: list[Pass], held: set[str]) -> None:
    """Adds the only provider of each missing requirement."""
    index = 0
    while index < len(passes):
        for prop in passes[index].requires:
            if prop in held or any(prop in p.provides for p in passes):
                continue
            options = registry.providers(prop)
            if len(options) != 1:
                names = ", ".join(sorted(cls.name for cls in options))
                raise RecipeError(
                    f"Pass {passes[index].name} requires {prop}, which "
                    + (f"several passes provide: {names}" if options else "no pass provides"),
                    fix="Name one of them in the recipe" if options else "",
                )
            passes.append(options[0]())
        index += 1


def _refuse_conflicts(passes: Sequence[Pass], held: set[str]) -> None:
    for one in passes:
        for prop in one.conflicts:
            others = [p.name for p in passes if prop in p.provides and p is not one]
            if others or prop in held:
                found = ", ".join(others) or "the program's history"
                raise RecipeError(f"Pass {one.name} excludes {prop}, which comes from {found}")


def _order(passes: Sequence[Pass], listed: Sequence[Pass] = ()) -> list[Pass]:
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for later, wanting in enumerate(passes):
        for earlier, providing in enumerate(passes):
            if earlier != later and _awaited(wanting, providing):
                graph.add_edge(earlier, later)
    if not networkx.is_directed_acyclic_graph(graph):
        cycle = [passes[edge[0]].name for edge in networkx.find_cycle(graph)]
        raise RecipeError(f"No order satisfies all requirements: {' needs '.join([*cycle, cycle[0]])}")
    meant = [i for i, one in enumerate(passes) if one.kind == "approximate" and any(one is p for p in listed)]
    for first, second in itertools.combinations(meant, 2):
        if networkx.has_path(graph, second, first):
            chain = [passes[i] for i in networkx.shortest_path(graph, second, first)]
            raise _contradiction(chain)
    graph.add_edges_from(itertools.combinations(meant, 2))
    return [passes[i] for i in networkx.lexicographical_topological_sort(graph, key=lambda i: i)]


def _awaited(wanting: Pass, providing: Pass) -> list[str]:
    """The properties of one pass that another one must find in the program."""
    return sorted((set(wanting.requires) | set(wanting.after)) & set(providing.provides))


def _contradiction(chain: Sequence[Pass]) -> RecipeError:
    """The error for a recipe that lists the last pass of a chain, whose order is a must, before the first."""
    early, late = chain[0].name, chain[-1].name
    reasons = [
        f"{later.name} works on what is {', '.join(_awaited(later, earlier))} and {earlier.name} makes it so"
        for earlier, later in itertools.pairwise(chain)
    ]
    return RecipeError(
        f"The recipe lists {late} before {early}, which must come first: {'; '.join(reasons)}",
        fix=f"List {early} before {late}",
    )


@dataclass
class PassManager:
    """Runs passes over a program.

    Attributes:
        context: what passes may ask for.
        budget: limits for approximate passes.
        verify: whether to compare numbers after each pass.
        observers: called after each pass.
        dump: directory for the text of each stage, or None.
        stop_when_empty: run no further pass once the context's fuel is spent, as bisect wants.
    """

    context: Context
    budget: Budget = field(default_factory=Budget)
    verify: bool = True
    observers: tuple[Observer, ...] = ()
    dump: Path | None = None
    stop_when_empty: bool = False

    def run(self, program: Program, passes: Sequence[Pass], *, consume: bool = False) -> Program:
        """The program after all passes.

        `program` itself is not changed, unless `consume` allows it: then weights that a pass replaces are freed as
        soon as nothing needs them any more, and the caller must not use `program` again.

        Raises:
            PassError: a pass failed or broke its contract.
        """
        current = program if consume else program.clone()
        self._dump(current, 0, "capture")
        outputs: dict[int, tuple[Tensor, ...]] = {}
        for number, one in enumerate(passes, start=1):
            if self.stop_when_empty and self.context.fuel.empty:
                break
            self.context.progress(one.name, (number - 1) / len(passes))
            stored = set(current.weights())
            current = self._run_one(one, current, outputs, consume)
            if set(current.weights()) != stored:
                # The nodes of replaced graphs refer to each other, and would keep replaced weights for a while.
                gc.collect()
            self._dump(current, number, one.name)
        self.context.progress("", 1.0)
        return current

    def _run_one(self, one: Pass, before: Program, outputs: dict[int, tuple[Tensor, ...]], consume: bool) -> Program:
        frees = consume and one.replaces_weights and not self._runs_again(one, before)
        kept = self._without_weights(before, outputs) if frees else before.clone()
        started = time.perf_counter()
        result = self._guarded(one, before)
        after = result.program
        clean.refresh(after.module)
        clean.clean(after.module)
        record = PassRecord(
            name=one.name,
            kind=one.kind,
            options=one.model_dump(mode="json", exclude_defaults=True),
            sites=len(result.sites),
            nodes_before=len(kept.graph.nodes),
            nodes_after=len(after.graph.nodes),
            notes=_notes(result),
        )
        left = one.leftover(after)
        if left is not None:
            raise PassError(f"Pass {one.name} says it provides {', '.join(one.provides)}, but {left}")
        if self.verify and result.sites:
            record.error = self._check(one, kept, after, result, record, outputs)
        elif result.sites or kept.contract != after.contract:
            outputs.clear()
        record.seconds = time.perf_counter() - started
        finished = after.with_(history=(*kept.history, record))
        for observer in self.observers:
            observer(record, kept, finished)
        return finished

    def _runs_again(self, one: Pass, program: Program) -> bool:
        """Whether the program before a pass runs after it: on calibration batches, or a narrow one in float32."""
        narrow = any(weight.dtype in NARROW for weight in program.weights().values())
        return bool(self.context.calibration) if one.kind == "approximate" else narrow

    def _without_weights(self, program: Program, outputs: dict[int, tuple[Tensor, ...]]) -> Program:
        """The graph alone, whose weights can be freed one by one; what it computes is put into `outputs` before."""
        for index, sizes in enumerate(VERIFY_SIZES if self.verify else ()):
            if index not in outputs:
                outputs[index] = program(**drawn(program, sizes, self.context.seed))
        return program.shape_only()

    def _guarded(self, one: Pass, program: Program) -> PassResult:
        try:
            return one.run(program, self.context)
        except GraphwrightError:
            raise
        except Exception as error:
            raise PassError(
                f"Pass {one.name} failed with {type(error).__name__}: {error}",
                fix=f"This is a defect of the pass; reproduce it with seed {self.context.seed} and {one.spec()}",
            ) from error

    def _check(
        self,
        one: Pass,
        before: Program,
        after: Program,
        result: PassResult,
        record: PassRecord,
        outputs: dict[int, tuple[Tensor, ...]],
    ) -> float:
        own = one.verify(before, after, self.context)
        if own is not None:
            outputs.clear()
            limit = numerics.EXACT_TOLERANCE[torch.float32]
            if one.kind != "approximate" and own > limit:
                raise VerificationError(
                    f"Pass {one.name} changed the outputs by {own:.2e} (relative); {limit:.0e} is allowed",
                    fix="Find the step with `graphwright bisect`",
                )
            return own
        if one.kind == "approximate":
            expected = outputs.get(0)
            outputs.clear()
            return self._measure(one, before, after, result, record, expected)
        return self._compare(one, before, after, outputs)

    def _compare(self, one: Pass, before: Program, after: Program, outputs: dict[int, tuple[Tensor, ...]]) -> float:
        worst = 0.0
        for index, sizes in enumerate(VERIFY_SIZES):
            inputs = drawn(before, sizes, self.context.seed)
            expected = outputs[index] if index in outputs else before(**inputs)
            actual = after(**drawn(before, sizes, self.context.seed))
            outputs[index] = actual
            error, limit = numerics.outputs_error(actual, expected, inputs), numerics.tolerance(expected)
            if error > limit and any(output.dtype in NARROW for output in expected):
                # The rounding of a deep narrow model can be larger than any limit that would still find a mistake.
                error, limit = self._wide_error(before, after, sizes)
            worst = max(worst, error)
            if error > limit:
                raise VerificationError(
                    f"Pass {one.name} is declared exact but changed the outputs by {error:.2e} (relative); "
                    f"{limit:.0e} is allowed",
                    where="" if before.is_meta else first_divergence(before, after, inputs),
                    fix=f"Reproduce with sizes {dict(sizes)} and seed {self.context.seed}, or run `graphwright bisect`",
                )
        return worst

    def _wide_error(self, before: Program, after: Program, sizes: Mapping[str, int]) -> tuple[float, float]:
        """The error of the same two programs in float32, and its limit."""
        wide = widened(before)
        inputs = drawn(wide, sizes, self.context.seed)
        expected, actual = wide(**inputs), widened(after)(**drawn(wide, sizes, self.context.seed))
        return numerics.outputs_error(actual, expected, inputs), numerics.tolerance(expected)

    def _measure(
        self,
        one: Pass,
        before: Program,
        after: Program,
        result: PassResult,
        record: PassRecord,
        drawn_outputs: tuple[Tensor, ...] | None,
    ) -> float:
        """The error on calibration batches; without any, on drawn inputs, whose outputs before may be known."""
        batches = self.context.calibration[:MEASURED]
        known = None if batches else drawn_outputs
        kl, error = 0.0, 0.0
        if one.streamed and not batches:
            batches = [{"input_ids": self._tokens(before, one.streamed)}]
        for batch in batches or [drawn(before, VERIFY_SIZES[0], self.context.seed)]:
            if one.streamed:
                expected, actual = (_streamed(program, batch) for program in (before, after))
            else:
                expected = known or before(**batch_inputs(before, batch))
                actual = after(**batch_inputs(after, batch))
            error = max(error, numerics.outputs_error(actual, expected, batch))
            kl += numerics.mean_kl(actual[0], expected[0]) / max(len(batches), 1)
        record.notes["kl"] = kl
        worst = max(result.layer_errors, key=lambda name: result.layer_errors[name], default="")
        for measured, limit, what in (
            (kl, self.budget.kl, "KL divergence"),
            (error, self.budget.relative_error, "error"),
        ):
            if limit is not None and measured > limit:
                raise BudgetError(
                    f"Pass {one.name} costs a {what} of {measured:.4g}; the recipe's budget is {limit:g}",
                    where=f"worst layer {worst} with relative error {result.layer_errors[worst]:.3g}" if worst else "",
                    fix="Raise the budget, use more bits or smaller groups, or keep that layer in full precision",
                )
        return error

    def _tokens(self, program: Program, length: int) -> Tensor:
        """Drawn tokens [1, length]."""
        token = program.contract.input("token")
        high = max(token.high, 2) if token else 2
        shape = (1, min(length, program.contract.dim("sequence").max))
        return torch.randint(0, high, shape, generator=self.context.generator())

    def _dump(self, program: Program, number: int, name: str) -> None:
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / f"{number:03d}_{name}.txt").write_text(program.text())


def _streamed(program: Program, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    ids = batch["input_ids"]
    ends = [*range(STREAMED_CHUNK, ids.shape[1], STREAMED_CHUNK), ids.shape[1]]
    return (logits_in_chunks(program, ids, batch.get("attention_mask"), ends),)


def drawn(program: Program, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random inputs and fresh state for `program`."""
    inputs = program.contract.draw(sizes, seed)
    concrete = program.contract.sizes(sizes)
    return {**inputs, **program.contract.allocate(concrete)}


def first_divergence(before: Program, after: Program, inputs: Mapping[str, Tensor]) -> str:
    """The first node, among those both graphs have, whose value differs; described for a person."""
    expected = _values(before, inputs)
    actual = _values(after, inputs)
    for node in after.graph.nodes:
        value, want = actual.get(node.name), expected.get(node.name)
        if not isinstance(value, Tensor) or not isinstance(want, Tensor):
            continue
        if not value.is_floating_point() and value.dtype == want.dtype and torch.equal(value, want):
            continue
        if value.dtype == torch.bool or numerics.relative_error(value, want) > numerics.EXACT_TOLERANCE.get(
            value.dtype, 0
        ):
            return describe(node)
    return "the outputs; all nodes that both graphs share agree"


def _values(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    values: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)].clone()
        elif node.op == "get_attr":
            values[node] = program.weight(node)
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return {node.name: value for node, value in values.items()}


def _notes(result: PassResult) -> dict[str, Any]:
    notes = dict(result.notes)
    if result.near_misses and not result.sites:
        notes["near_misses"] = result.near_misses
    if result.layer_errors:
        notes["layer_errors"] = result.layer_errors
    return notes


def pass_diff(before: Program, after: Program) -> str:
    """A readable difference of two programs' texts, without shapes and with equal lines left out."""
    old, new = (text.render(p, shapes=False, numbered=False).splitlines() for p in (before, after))
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=1))


__all__ = [
    "Observer",
    "PassManager",
    "drawn",
    "first_divergence",
    "pass_diff",
    "plan_passes",
]
