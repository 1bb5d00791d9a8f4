"""Low-rank compensation of quantized layers: W ~ Q + A B, where A B is what rounding lost, as far as its rank goes.

    before                  after
    y = linear(x, W, b)     y = quantized_linear(x, Q, b) + linear(linear(x, B), A)

With one turn, Q rounds W and A B is the truncated SVD of W - Q (LoRC, Yao et al. 2023, arXiv:2303.08302). LoftQ goes
on by turns: Q rounds W - A B, and A B follows from the new W - Q. The turn with the least ||W - Q - A B|| is taken.
The factors may be rounded to 8 bits, one scale per row, as LoRC's are.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright import rounding
from graphwright.errors import PassError
from graphwright.factorizer import Factors, factors
from graphwright.ops import quantized_linear
from graphwright.pass_ import Paper
from graphwright.passes.low_rank.svd import Svd
from graphwright.rewrite import Editor
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import IntegerQuantizer, Layer

aten = torch.ops.aten


FACTOR = Scheme(format="int8", group_size=0, symmetric=True)


@dataclass(frozen=True)
class Rounded:
    """A and B in codes."""

    left: Quantized
    right: Quantized

    def dense(self) -> Tensor:
        """A B."""
        return self.left.dense() @ self.right.dense()


class LoftQ(IntegerQuantizer):
    """Rounds weights and keeps a thin product beside each."""

    name = "loftq"
    paper = Paper(
        "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", "Li et al.", 2023, "2310.08659"
    )
    # The thin product fills in what was pruned.
    conflicts = (*IntegerQuantizer.conflicts, "sparse")

    rank: int = Field(16, gt=0, description="columns of A and rows of B")
    turns: int = Field(5, gt=0, description="alternations of rounding and SVD; 1 is LoRC")
    factor_bits: Literal[0, 8] = Field(0, description="bits of A and B, one scale per row; 0 keeps them")

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """The rounded part of the best turn.

        Raises:
            PassError: the rank is not smaller than the weight's sides.
        """
        if self.rank >= min(weight.shape):
            raise PassError(
                f"Rank {self.rank} is not below the sides of a weight of {tuple(weight.shape)}",
                fix=f"The nearest rank that is legal is {min(weight.shape) - 1}; or keep the layer under layers",
            )
        wide = weight.float()
        best, lowest, product = None, float("inf"), torch.zeros_like(wide)
        for _ in range(self.turns):
            found = rounding.quantize(wide - product, scheme)
            dense = found.dense()
            product = self._factors(wide, dense).dense()
            error = float((wide - dense - product).norm())
            if error < lowest:
                best, lowest = found, error
        if best is None:
            raise PassError("A weight is NaN or infinite", fix="Give a checkpoint that is whole")
        return best

    def error(self, weight: Tensor, quantized: Quantized, statistics: Any) -> float:
        """Relative error of the weight, with the thin product."""
        wide, dense = weight.float(), quantized.dense()
        difference = wide - dense - self._factors(wide, dense).dense()
        return float(difference.norm() / wide.norm().clamp(min=1e-30))

    def compensate(self, editor: Editor, layer: Layer, quantized: Quantized, node: fx.Node) -> None:
        """Adds the thin product to the quantized layer."""
        weight = editor.program.weight(layer.weight)
        found = self._factors(weight.float(), quantized.dense())
        users = list(node.users)
        before = users[0]
        thin = _factor(editor, f"{layer.name}_right", found.right, layer.node.args[0], weight.dtype, before)
        wide = _factor(editor, f"{layer.name}_left", found.left, thin, weight.dtype, before)
        total = editor.call(aten.add.Tensor, node, wide, before=before)
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def _factors(self, weight: Tensor, dense: Tensor) -> Factors | Rounded:
        found = factors(weight - dense, Svd().scaling(None, weight.shape[1]), self.rank)
        if not self.factor_bits:
            return found
        return Rounded(rounding.quantize(found.left, FACTOR), rounding.quantize(found.right, FACTOR))


def _factor(
    editor: Editor, name: str, factor: Tensor | Quantized, x: fx.Node, dtype: torch.dtype, before: fx.Node
) -> fx.Node:
    """The product of x with one factor."""
    if isinstance(factor, Tensor):
        return editor.call(aten.linear.default, x, editor.weight(name, factor.to(dtype), before), before=before)
    codes = editor.weight(f"{name}_{FACTOR.format}", factor.packed, before)
    scale = editor.weight(f"{name}_scale", factor.grid.scale, before)
    rest = (None, None, FACTOR.format, factor.group_size)
    return editor.call(quantized_linear, x, codes, scale, *rest, before=before)
