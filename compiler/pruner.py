"""What the methods share that remove single weights: an exact zero stays where a weight was.

The graph keeps its linear layers; `compress_sparse` stores the zeros away, and weight quantizers keep them zero.
"""

from dataclasses import dataclass
from typing import Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from graphwright.calibration import Hessian
from graphwright.layer_pass import Layer, LayerPass
from graphwright.pass_ import Pass
from graphwright.rewrite import Editor
from graphwright.sparsity import Pattern


class PatternOptions(Pass):
    """Options of passes that remove weights in a pattern."""

    ratio: float | None = Field(None, gt=0, lt=1, description="part of the weights to remove; 0.5 unless n:m says it")
    pattern: str = Field("unstructured", description="unstructured, n:m along the input such as 2:4, or blocks RxC")

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        Pattern.parse(value)
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        fixed = self.shape.ratio
        if fixed is not None and self.ratio is not None and abs(self.ratio - fixed) > 1e-9:
            raise ValueError(f"the pattern {self.pattern} removes {fixed:g}; leave ratio out, or use unstructured")
        return self

    @property
    def shape(self) -> Pattern:
        """The pattern."""
        return Pattern.parse(self.pattern)

    @property
    def removed(self) -> float:
        """The part that is removed."""
        return self.shape.ratio or self.ratio or 0.5


@dataclass(frozen=True)
class Pruned:
    """A weight [N, K] with zeros."""

    weight: Tensor

    def dense(self) -> Tensor:
        """Itself."""
        return self.weight


class Pruner(PatternOptions, LayerPass):
    """Base of the methods that zero weights in a pattern."""

    after = (*LayerPass.after, "low_rank")
    provides = ("sparse",)
    conflicts = ("sparse",)

    def prune(self, weight: Tensor, statistics: Hessian | None) -> Tensor:
        """The weight [N, K] with zeros, float32."""
        raise NotImplementedError(f"pass {self.name} prunes nothing")

    def solve(self, layer: Layer, weight: Tensor, statistics: Hessian | None) -> Pruned:
        """Prunes one weight.

        Raises:
            PassError: the pattern does not divide the weight's shape.
        """
        self.shape.check(weight.shape)
        return Pruned(self.prune(weight, statistics))

    def install(self, editor: Editor, layer: Layer, solved: Pruned) -> None:
        """Stores the pruned weight."""
        dtype = layer.weight.meta["val"].dtype
        editor.set_weight(layer.node, 1, solved.weight.to(dtype))
        zeros = float((solved.weight == 0).float().mean())
        editor.note(layer.node, f"{layer.name}: {zeros:.1%} zeros")
