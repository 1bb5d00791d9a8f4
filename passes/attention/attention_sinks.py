"""StreamingLLM's mask: a query sees the first `sinks` tokens of its text and the last `window`.

With `shift` positions count by what is seen, not by place in the text: seen from a query far behind, the sinks stand
directly before the window, so no distance is larger than the model was trained for. An attention whose queries and
keys were rotated can say that with heads of twice the width, at twice the work and memory for keys:

    before                                            after                              M = sinks + window - 1
    q, k = rope(x, p), rope(y, p)                     q' = [rope(x, p); rope(x, min(p, M))]
    attention(q, k, v)                                k' = [k * (p >= sinks); k * (p < sinks)]
                                                      attention(q', k', v, window, anchors=sinks)

Positions that are learned are added to the tokens and stay; slopes of ALiBi count true distances, which the pass says.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import fx

from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import attention, rope
from graphwright.pass_ import Context, Paper, PassResult
from graphwright.passes.attention._limiting import LimitedAttention
from graphwright.program import Program
from graphwright.rewrite import Editor, describe

aten = torch.ops.aten


class AttentionSinks(LimitedAttention):
    """Sinks and a window."""

    name = "attention_sinks"
    paper = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al.", 2024, "2309.17453")

    window: int = Field(gt=0, description="last keys that a query sees, its own included")
    sinks: int = Field(4, gt=0, description="first keys that every query sees")
    shift: bool = Field(False, description="let sinks stand before the window: heads of keys twice as wide")

    @property
    def limits(self) -> Mapping[str, int]:
        """Window and anchors."""
        return {"window": self.window, "anchors": self.sinks}

    def run(self, program: Program, context: Context) -> PassResult:
        """Limits every attention, and says where true distances remain.

        Raises:
            PassError: as the base, or `shift` is asked for and there is no rotation to shift.
        """
        result = super().run(program, context)
        slopes = any(argument(node, "alibi_slopes") is not None for node in program.calls(attention.target))
        result.notes["distances"] = "by place in the window" if self.shift else "true"
        if slopes:
            result.notes["left"] = "slopes of ALiBi count true distances"
        return result

    def operands(self, editor: Editor, node: fx.Node) -> tuple[fx.Node, fx.Node, float]:
        """Query and key as they are, or each twice, side by side."""
        query, key, scale = super().operands(editor, node)
        if not self.shift:
            return query, key, scale
        for one in (query, key):
            if one.target is not rope.target:
                raise PassError(
                    "Positions can be shifted where rotations make the scores, and this attention's do not",
                    where=describe(one),
                    fix="Leave the option shift out",
                )
        # One row of positions for each text, as those behind a cache are.
        batch = editor.call(aten.sym_size.int, query.args[0], 0, before=node)
        at = editor.call(aten.expand.default, argument(query, "positions"), [batch, -1], before=node)
        # What looks for positions looks through a limit from above.
        near = editor.call(aten.clamp.default, at, None, self.sinks + self.window - 1, before=node)
        rest = (argument(query, name) for name in ("inv_freq", "scaling", "interleaved"))
        shifted = editor.call(rope, query.args[0], near, *rest, before=node)
        both = editor.call(aten.cat.default, [query, shifted], -1, before=node)
        behind = editor.call(aten.ge.Scalar, at, self.sinks, before=node)
        behind = editor.call(aten.unsqueeze.default, behind, 1, before=node)
        behind = editor.call(aten.unsqueeze.default, behind, 3, before=node)
        parts = []
        for chosen in (behind, editor.call(aten.logical_not.default, behind, before=node)):
            factor = editor.call(aten.to.dtype, chosen, key.meta["val"].dtype, before=node)
            parts.append(editor.call(aten.mul.Tensor, key, factor, before=node))
        return both, editor.call(aten.cat.default, parts, -1, before=node), scale
