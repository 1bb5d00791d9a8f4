"""What passes share that cut units (channels, heads) out of the graph: scores, the choice, the cut."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional

from graphwright import calibration
from graphwright.calibration import Hessian, Stop
from graphwright.dependency import Group, cut, settle, split_merged, tied
from graphwright.errors import PassError
from graphwright.feeding import batch_inputs
from graphwright.folding import value_of
from graphwright.layer_pass import refuse_after
from graphwright.op import op_of
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


class UnitPruner(Pass):
    """Base of the passes that remove the least important units of each group."""

    kind = "approximate"
    requires = ("linear", "attention", "rope", "rms_norm", "gated_activation", "grouped_heads", "mask")
    after = ("float_dtype", "fewer_layers")
    provides = ("pruned",)
    undoes: ClassVar[tuple[str, ...]] = ("merged_linear", "kv_cache", "explicit_kv_cache", "quantized", "sparse",
                                         "low_rank")  # fmt: skip
    what: ClassVar[str]

    ratio: float = Field(0.2, gt=0, lt=1, description="part of each group's units to remove, rounded down")
    score: Literal["magnitude", "wanda", "taylor"] = Field(
        "wanda", description="squared weights; weights times activations; or first-order change of the loss"
    )

    @property
    def calibrates(self) -> bool:
        """All scores but magnitudes do."""
        return self.score != "magnitude"

    def groups(self, program: Program) -> tuple[list[Group], list[str]]:
        """What can be cut, and why other places cannot."""
        raise NotImplementedError(f"pass {self.name} finds no groups")

    def removed(self, units: int) -> int:
        """How many of so many units go."""
        return int(self.ratio * units + 1e-9)

    def nearest(self, units: int) -> str:
        """Advice for a ratio that removes none of so many units."""
        legal = next((count for count in range(1, units) if self._with(count / units).removed(units)), None)
        if legal is None:
            return f"None of {units} can go; prune single weights instead, with wanda or sparsegpt"
        return f"The nearest ratio that is legal is {legal / units:.3g}"

    def _with(self, ratio: float) -> "UnitPruner":
        return self.model_copy(update={"ratio": ratio})

    def run(self, program: Program, context: Context) -> PassResult:
        """Cuts every group.

        Raises:
            PassError: the program has no group, the ratio removes no unit of any, or an earlier pass is in the way.
        """
        refuse_after(self, program, self.undoes)
        with Editor(program, self.name, context.fuel) as editor:
            split_merged(editor)
            groups, misses = self._free(program, *self.groups(program))
            groups = [group for group in groups if editor.allow(group.source)]
            self._refuse_nothing(groups, misses, context)
            scores = self._scores(program, context, groups)
            notes: dict[str, Any] = {"removed": {}, "left": misses}
            for group, score in zip(groups, scores, strict=True):
                count = self.removed(group.units)
                if count:
                    keep = torch.ones(group.units, dtype=torch.bool)
                    keep[score.argsort(stable=True)[:count]] = False
                    cut(editor, group, keep)
                    notes["removed"][group.name] = [count, group.units]
            editor.program.graph.eliminate_dead_code()
            settle(program)
        return PassResult(program, editor.sites, notes=notes)

    def _free(self, program: Program, groups: list[Group], misses: list[str]) -> tuple[list[Group], list[str]]:
        """The groups whose weights nothing else reads, and why others are none."""
        shared = {group.name: tied(program, group) for group in groups}
        reasons = [f"{name}: the weight {other} is tied to another layer" for name, other in shared.items() if other]
        return [group for group in groups if not shared[group.name]], [*misses, *reasons]

    def _refuse_nothing(self, groups: list[Group], misses: list[str], context: Context) -> None:
        if context.fuel.empty:
            return
        if not groups:
            raise PassError(
                f"No {self.what} can be cut" + (f": {misses[0]}" if misses else ""),
                fix="Prune single weights instead, with wanda or sparsegpt",
            )
        if not any(self.removed(group.units) for group in groups):
            most = max(groups, key=lambda group: group.units)
            raise PassError(
                f"A ratio of {self.ratio:g} removes none of {most.units} {self.what}",
                where=most.name,
                fix=self.nearest(most.units),
            )

    def _scores(self, program: Program, context: Context, groups: list[Group]) -> list[Tensor]:
        if self.score == "taylor":
            return taylor(program, calibration.samples(program, context), groups, context)
        if self.score == "magnitude":
            return [_summed(group, lambda member: _square(program, member.operand)) for group in groups]
        norms: list[Tensor] = [torch.zeros(0)] * len(groups)

        def visit(index: int, collected: Hessian) -> dict[fx.Node, Tensor]:
            norms[index] = collected.matrix.diagonal().clone()
            return {}

        order = {node: place for place, node in enumerate(program.graph.nodes)}
        groups.sort(key=lambda group: order[group.source])
        stops = [Stop(group.source, f"{self.name} {group.name}") for group in groups]
        calibration.walk(program, calibration.samples(program, context), stops, Hessian, visit, context.progress)
        # The weights that read a unit, times the norms of what it carries.
        return [
            _summed(group, lambda member, norm=norm: _square(program, member.operand) * norm, axis=1)
            for group, norm in zip(groups, norms, strict=True)
        ]


def removed_to_multiple(units: int, ratio: float, multiple: int) -> int:
    """At most this part of so many units, such that a multiple of a number stays."""
    stay = units - int(ratio * units + 1e-9)
    return units - min(units, -(-stay // multiple) * multiple)


def taylor(program: Program, batches: list[dict[str, Tensor]], groups: list[Group], context: Context) -> list[Tensor]:
    """|sum of w * dL/dw| over the weights of each unit, L the mean loss of the next token (LLM-Pruner, vector-wise).

    Raises:
        PassError: the program predicts no next token.
    """
    tokens = program.contract.input("token")
    if tokens is None or not program.metadata.causal:
        raise PassError("Taylor scores need a program that predicts the next token", fix="Use score: wanda")
    weights = {n: program.weight(n).detach().float().requires_grad_() for n in _reads(groups)}
    names = {str(node.target): tensor for node, tensor in weights.items()}
    for count, batch in enumerate(batches):
        context.progress("taylor scores", count / len(batches))
        inputs = batch_inputs(program, batch)
        logits = _differentiable(program, inputs, names)
        ids = inputs[tokens.name]
        if ids.shape[1] > 1:
            functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    def change(member: Any) -> Tensor:
        tensor = weights[member.operand.node.args[member.operand.position]]
        grad = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        return (
            (tensor * grad)
            .detach()
            .movedim(member.operand.axis, 0)
            .reshape(tensor.shape[member.operand.axis], -1)
            .sum(1)
        )

    return [_summed(group, change).abs() for group in groups]


def _reads(groups: list[Group]) -> list[Any]:
    return [member.operand.node.args[member.operand.position] for group in groups for member in group.members]


def _differentiable(program: Program, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """The first output, through the references of semantic ops, which have gradients."""
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = weights.get(str(node.target), program.weight(node).detach())
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            semantic = op_of(node.target)
            values[node] = (semantic.reference if semantic else node.target)(*args, **kwargs)
    outputs: Any = program.graph.output_node().args[0]
    found: Tensor = values[outputs[0]]
    return found


def _square(program: Program, operand: Any) -> Tensor:
    """Squares of a constant, summed over all axes but the operand's."""
    squares = value_of(program, operand).float().square()
    return squares.movedim(operand.axis, 0).reshape(squares.shape[operand.axis], -1).sum(1)


def _summed(group: Group, score: Any, axis: int | None = None) -> Tensor:
    """Scores per unit, over all members, or those that lie along one axis."""
    total = torch.zeros(group.units)
    for member in group.members:
        if axis is None or member.operand.axis == axis:
            total += score(member)[member.places].sum(1)
    return total
