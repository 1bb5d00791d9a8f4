"""Low-bit weights for the experts of a mixture: every expert is rounded by itself, and all stand in one tensor.

before                                  after
y = experts(x, w, ids, up, …)           y = quantized_experts(x, w, ids, up codes, scale, zero_point, …)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright import rounding
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import experts, quantized_experts
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme

Solve = Callable[[Tensor, Scheme], Quantized]


@dataclass(frozen=True)
class Stack:
    """The weights [E, N, K] of one product of all experts."""

    weight: fx.Node
    scheme: Scheme

    @property
    def name(self) -> str:
        """Name of the weights."""
        return str(self.weight.target)


@dataclass(frozen=True)
class ExpertLayer:
    """An `experts` call whose weights shall be quantized."""

    node: fx.Node
    up: Stack
    down: Stack


def expert_layers(program: Program, scheme_of: Callable[[str], Scheme | None]) -> list[ExpertLayer]:
    """Every `experts` call with constant weights and a scheme for both of them.

    Raises:
        PassError: the two weights of a layer are to have different formats, or only one shall be quantized.
    """
    found = []
    for node in program.calls(experts.target):
        weights = [argument(node, name) for name in ("up", "down")]
        if any(weight.op != "get_attr" for weight in weights):
            continue
        up, down = (scheme_of(str(weight.target)) for weight in weights)
        if up is None and down is None:
            continue
        if up is None or down is None or up.format != down.format:
            formats = " and ".join("floating point" if s is None else s.format for s in (up, down))
            raise PassError(
                f"Both weights of a layer of experts have one format, and {formats} are asked for",
                where=" and ".join(str(weight.target) for weight in weights),
                fix="Let a pattern of the option layers match both",
            )
        found.append(ExpertLayer(node, Stack(weights[0], up), Stack(weights[1], down)))
    return found


def quantize_experts(
    editor: Editor, layer: ExpertLayer, solve: Solve, progress: Callable[[str], None]
) -> dict[str, float]:
    """Puts quantized experts in the place of plain ones; returns the relative error of each weight by name."""
    node, before, errors = layer.node, layer.node, {}
    stored: list[fx.Node | None] = []
    groups = []
    for stack in (layer.up, layer.down):
        weight = editor.program.weight(stack.weight)
        solved = []
        for index, one in enumerate(weight):
            progress(f"{stack.name}, expert {index}")
            solved.append(_solved(one, stack, index, solve))
        errors[stack.name] = max(rounding.relative_weight_error(w, q) for w, q in zip(weight, solved, strict=True))
        codes = torch.stack([q.packed for q in solved])
        scale = torch.stack([q.grid.scale for q in solved])
        zeros = [q.grid.zero_point for q in solved if q.grid.zero_point is not None]
        stored.append(editor.weight(f"{stack.name}_{stack.scheme.format}", codes, before))
        stored.append(editor.weight(f"{stack.name}_scale", scale, before))
        zero = editor.weight(f"{stack.name}_zero_point", torch.stack(zeros), before) if zeros else None
        stored.append(zero)
        groups.append(solved[0].group_size)
    given = {name: argument(node, name) for name in ("x", "weights", "indices", "up_bias", "down_bias")}
    rest = [argument(node, name) for name in ("activation", "gated", "alpha", "limit")]
    new = editor.call(
        quantized_experts, given["x"], given["weights"], given["indices"], *stored[:3], given["up_bias"], *stored[3:],
        given["down_bias"], layer.up.scheme.format, *groups, *rest, before=before,
    )  # fmt: skip
    editor.replace(node, new, layer.up.name)
    editor.retire(node)
    return errors


def _solved(weight: Tensor, stack: Stack, index: int, solve: Solve) -> Quantized:
    try:
        return solve(weight, stack.scheme)
    except PassError as reason:
        where = reason.where or f"{stack.name}, expert {index}"
        raise PassError(reason.problem, where=where, fix=reason.fix) from reason
