"""Logits only where they are asked for: the vocabulary projection runs on chosen positions, not on all.

    before                                  after
    logits = linear(hidden, head)           chosen = gather(hidden, logit_index)        [B, N, K]
                       [B, S, V]            logits = linear(chosen, head)               [B, N, V]

In a prefill only the last token's logits are needed, and the head is a fifth of a small model. `logit_index` [B, N]
picks positions of the input sequence: one for generation, all for perplexity, a few to verify a draft.
"""

import torch
from torch import fx

from graphwright import shapes, structure
from graphwright.contract import Dim, InputSpec
from graphwright.errors import PassError
from graphwright.feeding import logits_of
from graphwright.numerics import relative_error
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor, extend_contract

aten = torch.ops.aten


class SelectLogits(Pass):
    """Gathers hidden states before the head."""

    name = "select_logits"
    kind = "structural"
    requires = ("linear",)
    provides = ("selected_logits",)
    after = ("kv_cache",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Inserts the gather in front of the vocabulary projection.

        Raises:
            PassError: the first output is not a projection of hidden states.
        """
        head = structure.head(program)
        if head is None:
            raise PassError(
                "The first output is not a vocabulary projection of hidden states [batch, sequence, features]",
                fix="Use a recipe without select_logits",
            )
        inputs = extend_contract(
            program,
            inputs=(InputSpec("logit_index", torch.int64, ("batch", "logits"), "logit_index"),),
            dims=(Dim("logits", 1, program.contract.dim("sequence").max),),
        )
        with Editor(program, self.name) as editor:
            hidden: fx.Node = head.args[0]  # type: ignore[assignment]
            width = int(hidden.meta["val"].shape[-1])
            index = editor.call(aten.unsqueeze.default, inputs["logit_index"], -1, before=head)
            index = editor.call(aten.expand.default, index, [-1, -1, width], before=head)
            chosen = editor.call(aten.gather.default, hidden, 1, index, before=head)
            head.args = (chosen, *head.args[1:])
            editor.note(head, "head")
        shapes.update(program.module, {head})
        return PassResult(program, editor.sites)

    def verify(self, before: Program, after: Program, context: Context) -> float:
        """Asks for every position's logits and compares."""
        token = before.contract.input("token")
        high = max(token.high, 2) if token else 2
        ids = torch.randint(0, high, (2, 5), generator=context.generator())
        return relative_error(logits_of(after, ids), logits_of(before, ids))
