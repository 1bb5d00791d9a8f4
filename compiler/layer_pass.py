"""What passes share that replace the weights of linear layers by cheaper ones in floating point.

The base finds the layers, hands a pass that is `calibrated` the X^T X of each layer's inputs as they are behind the
already changed layers before it, measures the error of each, and refuses programs in which the pass would undo what
another one did. The vocabulary head and weights that something else than linear layers reads too stay as they are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import Field, field_validator
from torch import Tensor, fx

from graphwright import calibration, registry, rounding, structure
from graphwright.calibration import Hessian, Stop
from graphwright.errors import PassError
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor


@dataclass(frozen=True)
class Layer:
    """A linear layer: the call and its weight [N, K]."""

    node: fx.Node
    weight: fx.Node

    @property
    def name(self) -> str:
        """Name of the weight."""
        return str(self.weight.target)


class Solved(Protocol):
    """What stands in for a weight."""

    def dense(self) -> Tensor:
        """The weight [N, K] that the layer computes with."""
        ...


class LayerPass(Pass):
    """Base of the passes that solve one linear layer after another."""

    kind = "approximate"
    requires = ("linear",)
    after: ClassVar[tuple[str, ...]] = ("merged_linear", "float_dtype", "folded", "pruned", "fewer_layers")
    undoes: ClassVar[tuple[str, ...]] = ("quantized",)
    """Properties of a program that the pass would destroy, so that it must come before what provides them."""
    calibrated: ClassVar[bool] = False

    skip: tuple[str, ...] = Field((), description="layers that stay: patterns of the names of weights")

    @field_validator("skip")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @property
    def calibrates(self) -> bool:
        """A calibrated pass does."""
        return self.calibrated

    def collector(self) -> Hessian:
        """The collector of one layer's inputs."""
        return Hessian()

    def prepare(self, program: Program, context: Context, layers: Sequence[Layer]) -> dict[str, Any]:
        """Looks at all layers before the first is solved; returns notes for the report."""
        return {}

    def solve(self, layer: Layer, weight: Tensor, statistics: Hessian | None) -> Solved | None:
        """What shall stand in for a weight, float32 [N, K], or None to leave it; statistics if calibrated."""
        raise NotImplementedError(f"pass {self.name} solves nothing")

    def install(self, editor: Editor, layer: Layer, solved: Any) -> None:
        """Puts what `solve` gave in the place of the layer."""
        raise NotImplementedError(f"pass {self.name} installs nothing")

    def run(self, program: Program, context: Context) -> PassResult:
        """Solves every layer.

        Raises:
            PassError: the program is quantized or the pass would undo another one, a layer cannot be solved, a weight
                is not finite, or a pattern names no layer.
        """
        refuse_after(self, program, self.undoes)
        errors: dict[str, float] = {}
        done: dict[str, Solved | None] = {}
        with Editor(program, self.name, context.fuel) as editor:
            layers = [layer for layer in self._layers(program) if editor.allow(layer.node)]
            notes = self.prepare(program, context, layers)

            def solve(layer: Layer, statistics: Hessian | None) -> Solved | None:
                if layer.name not in done:
                    weight = program.weight(layer.weight).float()
                    done[layer.name] = solved = self._solve(layer, weight, statistics)
                    if solved is not None:
                        errors[layer.name] = _error(weight, solved.dense(), statistics)
                if done[layer.name] is not None:
                    self.install(editor, layer, done[layer.name])
                return done[layer.name]

            if self.calibrated:
                self._walk(program, context, layers, solve)
            else:
                for count, layer in enumerate(layers):
                    context.progress(f"{self.name} {layer.name}", count / len(layers))
                    solve(layer, None)
        return PassResult(program, editor.sites, notes=notes, layer_errors=errors)

    def _walk(self, program: Program, context: Context, layers: list[Layer], solve: Any) -> None:
        stages = calibration.by_input(program, layers)

        def visit(index: int, collected: Hessian) -> dict[fx.Node, Tensor]:
            solved = [(layer.node, solve(layer, collected)) for layer in stages[index][1]]
            return {node: one.dense() for node, one in solved if one is not None}

        stops = [Stop(node, f"{self.name} {group[0].name}") for node, group in stages]
        batches = calibration.samples(program, context)
        calibration.walk(program, batches, stops, self.collector, visit, context.progress)

    def _solve(self, layer: Layer, weight: Tensor, statistics: Hessian | None) -> Solved | None:
        if not weight.isfinite().all():
            raise PassError("A weight is NaN or infinite", where=layer.name, fix="Give a checkpoint that is whole")
        try:
            return self.solve(layer, weight, statistics)
        except PassError as reason:
            raise PassError(reason.problem, where=reason.where or layer.name, fix=reason.fix) from reason

    def _layers(self, program: Program) -> list[Layer]:
        head, unmatched, layers = structure.head(program), set(self.skip), []
        found = [Layer(node, weight) for node, weight in structure.linears(program) if node is not head]
        calls = {layer.node for layer in found}
        reads: dict[str, set[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                reads.setdefault(str(node.target), set()).update(node.users)
        for layer in found:
            matched = {pattern for pattern in self.skip if re.search(pattern, layer.name)}
            unmatched -= matched
            if not matched and reads[layer.name] <= calls:
                layers.append(layer)
        if unmatched:
            names = ", ".join(layer.name for layer in found[:4])
            raise PassError(
                f"No layer's weight matches {', '.join(sorted(unmatched))}",
                where=f"option skip of pass {self.name}",
                fix=f"Weights are called {names}, …",
            )
        return layers


def refuse_after(one: Pass, program: Program, properties: tuple[str, ...]) -> None:
    """Refuses a program with a property that the pass would destroy or cannot see through.

    Raises:
        PassError: with the earlier pass.
    """
    for record in program.history:
        lost = sorted(set(registry.pass_class(record.name).provides) & set(properties))
        if lost:
            raise PassError(
                f"Pass {one.name} would undo {record.name}: the program is {', '.join(lost)} already",
                fix=f"Put both into one recipe, {one.name} before {record.name}",
            )


def _error(weight: Tensor, dense: Tensor, statistics: Hessian | None) -> float:
    """Relative error of the output where inputs were seen, else of the weight."""
    if statistics is not None:
        return rounding.output_error(weight, dense, statistics.matrix)
    return float((weight - dense).norm() / weight.norm().clamp(min=1e-30))
