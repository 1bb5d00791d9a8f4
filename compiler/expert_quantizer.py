"""Low-bit weights for the experts of a mixture: every expert is rounded by itself, and all stand in one tensor.

before                                  after
y = experts(x, w, ids, up, …)           y = quantized_experts(x, w, ids, up codes, scale, zero_point, …)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphwright.calibration import Stop
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import experts, quantized_experts
from graphwright.ops.experts import activate
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme

Solve = Callable[[Tensor, Scheme, Any], Quantized]
Error = Callable[[Tensor, Quantized, Any], float]


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


@dataclass
class Routed:
    """The tokens of a layer of experts during calibration, and which experts each of them goes to."""

    rows: list[Tensor] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)

    def add(self, *seen: Tensor) -> None:
        """Takes what a stop saw of a batch, then tokens [T, K] and indices [T, J]."""
        _, rows, indices = seen
        self.rows.append(rows)
        self.choices.append(indices.long())

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.rows), torch.cat(self.choices)

    def of(self, expert: int) -> Tensor:
        """The tokens of one expert."""
        rows, choices = self._all
        return rows[(choices == expert).any(1)]

    def pooled(self, count: int) -> Tensor:
        """At most `count` tokens of all experts, spread evenly."""
        rows = self._all[0]
        return rows[:: -(-len(rows) // count)]

    def usage(self, num_experts: int) -> Tensor:
        """How many tokens go to each expert, int64 [E]."""
        choices = self._all[1]
        return torch.bincount(choices[choices >= 0], minlength=num_experts)


POOLED_ROWS = 2048
"""Tokens that stand for all, where an expert sees too few of its own."""


@dataclass
class SolvedExperts:
    """Both stacks of a layer, rounded expert by expert, with relative errors, and which experts saw too few tokens."""

    stacks: tuple[list[Quantized], list[Quantized]] = field(default_factory=lambda: ([], []))
    errors: list[float] = field(default_factory=lambda: [0.0, 0.0])
    pooled: list[int] = field(default_factory=list)

    def dense(self) -> tuple[Tensor, Tensor]:
        """What the stacks stand for."""
        up, down = (torch.stack([one.dense() for one in stack]) for stack in self.stacks)
        return up, down


def stop_of(layer: ExpertLayer, order: dict[fx.Node, int], label: str) -> Stop:
    """Where a walk sees the tokens and the choices of a layer together, collected as `Routed`."""
    x, indices = (argument(layer.node, name) for name in ("x", "indices"))
    return Stop(max(x, indices, key=order.__getitem__), label, (x, indices), Routed)


def solve_experts(
    program: Program,
    layer: ExpertLayer,
    solve: Solve,
    error: Error,
    progress: Callable[[str], None],
    calibrated: tuple[Routed, Callable[[], Any], int] | None = None,
) -> SolvedExperts:
    """Rounds every expert by itself.

    An expert that sees at least the given number of tokens is calibrated on these; a rarer one on tokens of the whole
    layer, as if they were its own (GPTQ's error is then small where the layer's inputs lie, not where noise of a few
    rows does). The second product is calibrated behind the rounded first one.

    Args:
        program: holds the weights.
        layer: which experts.
        solve: rounds one weight, with statistics or None.
        error: the relative error of one weight, with the same.
        progress: is told every expert.
        calibrated: the layer's tokens, what makes a collector, and the least number of tokens; or None.
    """
    done = SolvedExperts()
    weights = [program.weight(stack.weight) for stack in (layer.up, layer.down)]
    bias = argument(layer.node, "up_bias")
    bias = None if bias is None else program.weight(bias)
    middle = [argument(layer.node, name) for name in ("activation", "gated", "alpha", "limit")]
    for expert in range(weights[0].shape[0]):
        progress(f"{layer.up.name}, expert {expert}")
        rows = None
        if calibrated is not None:
            rows = calibrated[0].of(expert)
            if len(rows) < calibrated[2]:
                done.pooled.append(expert)
                rows = calibrated[0].pooled(POOLED_ROWS)
        for place, stack in enumerate((layer.up, layer.down)):
            weight, statistics = weights[place][expert], None
            if rows is not None and calibrated is not None:
                statistics = calibrated[1]()
                statistics.add(rows)
            one = _solved(weight, stack, expert, solve, statistics)
            done.stacks[place].append(one)
            done.errors[place] = max(done.errors[place], error(weight, one, statistics))
            if rows is not None and place == 0:
                inner = functional.linear(rows, one.dense(), None if bias is None else bias[expert].float())
                rows = activate(inner, *middle)
    return done


def install_experts(editor: Editor, layer: ExpertLayer, solved: SolvedExperts) -> dict[str, float]:
    """Puts quantized experts in the place of plain ones; returns the largest relative error of each weight by name."""
    node, before = layer.node, layer.node
    stored: list[fx.Node | None] = []
    for stack, done in zip((layer.up, layer.down), solved.stacks, strict=True):
        stored.append(
            editor.weight(f"{stack.name}_{stack.scheme.format}", torch.stack([q.packed for q in done]), before)
        )
        stored.append(editor.weight(f"{stack.name}_scale", torch.stack([q.grid.scale for q in done]), before))
        zeros = [q.grid.zero_point for q in done if q.grid.zero_point is not None]
        stored.append(editor.weight(f"{stack.name}_zero_point", torch.stack(zeros), before) if zeros else None)
    groups = [done[0].group_size for done in solved.stacks]
    given = {name: argument(node, name) for name in ("x", "weights", "indices", "up_bias", "down_bias")}
    rest = [argument(node, name) for name in ("activation", "gated", "alpha", "limit")]
    new = editor.call(
        quantized_experts, given["x"], given["weights"], given["indices"], *stored[:3], given["up_bias"], *stored[3:],
        given["down_bias"], layer.up.scheme.format, *groups, *rest, before=before,
    )  # fmt: skip
    editor.replace(node, new, layer.up.name)
    return dict(zip((layer.up.name, layer.down.name), solved.errors, strict=True))


def _solved(weight: Tensor, stack: Stack, index: int, solve: Solve, statistics: Any) -> Quantized:
    try:
        return solve(weight, stack.scheme, statistics)
    except PassError as reason:
        where = reason.where or f"{stack.name}, expert {index}"
        raise PassError(reason.problem, where=where, fix=reason.fix) from reason
