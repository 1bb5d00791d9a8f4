"""Dynamic NTK: the base grows with the text, so that short texts are read as the model was trained for.

    before                                            after
    y = rope(x, positions, inv_freq)                  ratio = max(alpha * length / trained - (alpha - 1), 1)
                                                      y = rope(x, positions, inv_freq / ratio^(2i / (d - 2)))

`length` is the largest position of all sequences of one call, plus one: of a whole text in a forward without caches, of
the prompt in prefill, of the text so far in each step of decoding. Keys in a cache keep the rotation of the call that
wrote them. That is what transformers' rope_type dynamic does for one text, with `alpha` as its factor. There a batch
never lets the base shrink again before it is short enough for the trained context; here each call stands alone.

Proposed by emozilla in 2023; written up in section 3.1 of YaRN.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.match import argument
from graphwright.pass_ import Paper
from graphwright.passes.rope._frequencies import RopeScaling
from graphwright.rewrite import Editor

aten = torch.ops.aten


class DynamicNtk(RopeScaling):
    """NTK-aware scaling by what the length of the text asks for."""

    name = "dynamic_ntk"
    paper = Paper(
        "YaRN: Efficient Context Window Extension of Large Language Models", "Peng et al.", 2023, "2309.00071"
    )

    alpha: float | None = Field(
        None, ge=1, allow_inf_nan=False, description="how fast the base grows; as `factor` if left out"
    )

    def frequencies(self, editor: Editor, node: fx.Node, context_length: int, made: dict[Any, Any]) -> fx.Node:
        """Frequencies that follow from the positions, computed once for all ropes that share both."""
        name, positions = str(argument(node, "inv_freq").target), argument(node, "positions")
        if (name, positions) not in made:
            made[name, positions] = self._dynamic(editor, node, name, context_length)
        found: fx.Node = made[name, positions]
        return found

    def _dynamic(self, editor: Editor, node: fx.Node, name: str, context_length: int) -> fx.Node:
        def call(target: Any, *args: Any) -> fx.Node:
            return editor.call(target, *args, before=node)

        alpha = self.factor if self.alpha is None else self.alpha
        last = call(aten.to.dtype, call(aten.amax.default, argument(node, "positions")), torch.float32)
        # Both terms in one: alpha * (last + 1) / trained - (alpha - 1).
        grown = call(aten.mul.Tensor, last, alpha / context_length)
        ratio = call(aten.add.Tensor, grown, alpha / context_length - (alpha - 1))
        ratio = call(aten.clamp.default, ratio, 1.0)
        inv_freq = editor.program.weight(name).float()
        exponents = editor.weight(f"{name}_exponents", exponents_of(inv_freq), before=node)
        return call(aten.mul.Tensor, editor.read(name, before=node), call(aten.pow.Tensor_Tensor, ratio, exponents))


def exponents_of(inv_freq: Tensor) -> Tensor:
    """-2i / (d - 2) for i = 0 … d/2 - 1, float32."""
    half = inv_freq.shape[0]
    return (-torch.arange(half, dtype=torch.float64) / max(half - 1, 1)).float()
