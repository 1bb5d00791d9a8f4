"""What low-rank methods share: the rank of each layer under a budget, and two thin linear layers in place of one.

    before                    after
    y = linear(x, W, b)       y = linear(linear(x, B), A, b)          W [N, K] ~ A [N, r] B [r, K]

A method says in which norm a weight is approximated: it gives a matrix S [K, K] such that the truncated singular value
decomposition of W S is what counts, and S^-1 is multiplied back into B. Both factors get the square roots of the
singular values, so that their scales suit quantization alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from graphwright import calibration
from graphwright.calibration import Hessian, Stop
from graphwright.errors import PassError
from graphwright.layer_pass import Layer, LayerPass
from graphwright.pass_ import Context
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    """A [N, r] and B [r, K], float32."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """A B [N, K]."""
        return self.left @ self.right


@dataclass(frozen=True)
class Scaling:
    """S and its inverse: vectors [K] for diagonal ones, else [K, K]."""

    forward: Tensor
    inverse: Tensor

    def times(self, weight: Tensor) -> Tensor:
        """W S."""
        return weight * self.forward if self.forward.dim() == 1 else weight @ self.forward

    def divide(self, right: Tensor) -> Tensor:
        """B S^-1."""
        return right * self.inverse if self.inverse.dim() == 1 else right @ self.inverse


def factors(weight: Tensor, scaling: Scaling, rank: int) -> Factors:
    """The best approximation of a weight [N, K] of a rank, in the norm of (W - A B) S; computed in float64."""
    left, values, right = torch.linalg.svd(scaling.times(weight.double()), full_matrices=False)
    root = values[:rank].sqrt()
    thin = scaling.divide(root[:, None] * right[:rank])
    return Factors((left[:, :rank] * root).float(), thin.float())


class Factorizer(LayerPass):
    """Base of the methods that factor weights."""

    after = LayerPass.after
    provides = ("low_rank",)
    undoes = ("quantized", "sparse")

    ratio: float = Field(0.2, gt=0, lt=1, description="part of the parameters of linear layers to remove")
    allocation: Literal["uniform", "global"] = Field(
        "uniform", description="the same part of every layer, or ranks where singular values are large"
    )
    multiple: int = Field(8, gt=0, description="ranks are multiples of this, for the sake of kernels and groups")

    _ranks: dict[str, int] = PrivateAttr(default_factory=dict)

    def scaling(self, statistics: Any, width: int) -> Scaling:
        """S for a layer of K = `width`, float64.

        Raises:
            PassError: the statistics allow none.
        """
        raise NotImplementedError(f"pass {self.name} defines no scaling")

    def prepare(self, program: Program, context: Context, layers: Sequence[Layer]) -> dict[str, Any]:
        """Chooses the ranks."""
        shapes: dict[str, tuple[int, ...]] = {layer.name: tuple(layer.weight.meta["val"].shape) for layer in layers}
        if self.allocation == "uniform":
            ranks = {name: self._rank(rows, width) for name, (rows, width) in shapes.items()}
        else:
            spectra = self._spectra(program, context, {layer.name: layer for layer in layers})
            ranks = allocate(shapes, spectra, self.ratio, self.multiple)
        self._ranks.clear()
        self._ranks.update(ranks)
        kept = sum(_size(shapes[name], rank) for name, rank in ranks.items())
        whole = sum(rows * width for rows, width in shapes.values())
        return {"ranks": ranks, "removed": 1 - kept / whole if whole else 0.0}

    def solve(self, layer: Layer, weight: Tensor, statistics: Hessian | None) -> Factors | None:
        """Factors one weight; None where two factors would be no smaller than the weight."""
        rank = self._ranks[layer.name]
        if rank >= min(weight.shape):
            return None
        return factors(weight, self.scaling(statistics, weight.shape[1]), rank)

    def install(self, editor: Editor, layer: Layer, solved: Factors) -> None:
        """Puts two linear layers in the place of one."""
        node, dtype = layer.node, layer.weight.meta["val"].dtype
        right = editor.weight(f"{layer.name}_right", solved.right.to(dtype), node)
        left = editor.weight(f"{layer.name}_left", solved.left.to(dtype), node)
        thin = editor.call(aten.linear.default, node.args[0], right, before=node)
        wide = editor.call(aten.linear.default, thin, left, *node.args[2:], before=node)
        editor.replace(node, wide, f"{layer.name}: rank {solved.right.shape[0]}")

    def _rank(self, rows: int, width: int) -> int:
        """The largest legal rank that removes the ratio from one layer."""
        rank = int((1 - self.ratio) * rows * width / (rows + width)) // self.multiple * self.multiple
        if rank < 1:
            legal = 1 - self.multiple * (rows + width) / (rows * width)
            raise PassError(
                f"Removing {self.ratio:g} of a weight of {rows} x {width} leaves no rank that is a multiple of "
                f"{self.multiple}",
                fix=f"The largest ratio for it is {legal:.2f}"
                if legal > 0
                else "Use a smaller multiple, or name the layer under skip",
            )
        return rank

    def _spectra(self, program: Program, context: Context, layers: dict[str, Layer]) -> dict[str, Tensor]:
        """Squared singular values of every W S, as part of their sum."""
        found: dict[str, Tensor] = {}

        def measure(layer: Layer, statistics: Hessian | None) -> None:
            weight = program.weight(layer.weight).double()
            values = torch.linalg.svdvals(self.scaling(statistics, weight.shape[1]).times(weight)).square()
            found[layer.name] = values / values.sum().clamp(min=1e-30)

        if not self.calibrated:
            for layer in layers.values():
                measure(layer, None)
            return found
        stages = calibration.by_input(program, list(layers.values()))

        def visit(index: int, collected: Hessian) -> dict[Any, Tensor]:
            for layer in stages[index][1]:
                measure(layer, collected)
            return {}

        stops = [Stop(node, f"{self.name} spectrum {group[0].name}") for node, group in stages]
        batches = calibration.samples(program, context)
        calibration.walk(program, batches, stops, self.collector, visit, context.progress)
        return found


def allocate(
    shapes: dict[str, tuple[int, ...]], spectra: dict[str, Tensor], ratio: float, multiple: int
) -> dict[str, int]:
    """Ranks within a total of parameters, given to where a parameter removes most of the relative error.

    Singular values fall, so taking the steps of `multiple` ranks in the order of error removed per parameter is optimal
    but for the last step. A layer whose factors would be as large as itself stays whole, which is counted.

    Raises:
        PassError: one step for each layer is more than the budget.
    """
    budget = (1 - ratio) * sum(rows * width for rows, width in shapes.values())
    ranks = dict.fromkeys(shapes, multiple)
    used = sum(_size(shapes[name], rank) for name, rank in ranks.items())
    if used > budget:
        raise PassError(
            f"Rank {multiple} in every layer takes {used} parameters; removing {ratio:g} leaves {int(budget)}",
            fix="Remove less, or use a smaller multiple",
        )
    steps = [
        (float(values[start : start + multiple].sum()) / sum(shapes[name]), name, start)
        for name, values in spectra.items()
        for start in range(multiple, len(values), multiple)
    ]
    for _, name, start in sorted(steps, key=lambda step: -step[0]):
        rows, width = shapes[name]
        if ranks[name] != start:
            continue
        rank = min(start + multiple, rows, width)
        rank = min(rows, width) if rank * (rows + width) >= rows * width else rank
        more = _size(shapes[name], rank) - _size(shapes[name], ranks[name])
        if used + more <= budget:
            ranks[name], used = rank, used + more
    return ranks


def _size(shape: tuple[int, ...], rank: int) -> int:
    """Parameters of a layer at a rank: two factors, or the weight itself where they would be no smaller."""
    return min(rank * sum(shape), shape[0] * shape[1])
