"""Inputs and outputs for the check of a tree of guesses in one call (tree attention).

    before                                            after
    kv_cache_update(cache, k, positions)              kv_cache_update(cache, k, slots)
    y = attention(q, cache[:T], …, bias=None)         y = attention(q, cache[:T], …, bias=tree_mask)
    return logits                                     return logits, hidden

Guesses that exclude each other have one position and slots of their own. `tree_mask` [S, T] is 0 where a token may see
a slot and -inf where it holds a guess of another branch; `hidden` is what the head reads, and what Medusa heads read.
Without guesses slots are positions, and the mask is zeros. SpecInfer: Miao et al. 2023, arXiv:2305.09781.
"""

from typing import Any

import torch
from torch import fx

from graphwright import structure
from graphwright.contract import InputSpec
from graphwright.errors import PassError
from graphwright.feeding import token_inputs
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.ops import attention, kv_cache_update
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor, describe, extend_contract

aten = torch.ops.aten


class TreeVerification(Pass):
    """Adds slots and a mask as inputs, and the last hidden states as an output."""

    name = "tree_verification"
    kind = "structural"
    paper = Paper(
        "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        "Cai et al.",
        2024,
        "2401.10774",
    )
    requires = ("kv_cache",)
    after = ("selected_logits", "merged_linear", "quantized")
    provides = ("tree_inputs",)
    conflicts = ("tree_inputs",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewires caches and attentions.

        Raises:
            PassError: a cache is a ring or says in another way where tokens lie, or there is no vocabulary head.
        """
        head = structure.head(program)
        position = program.contract.input("position")
        if head is None or position is None:
            raise PassError("The program has no vocabulary head over tokens with positions, so it verifies no guesses")
        for node in program.calls(kv_cache_update.target):
            if str(node.args[2].target) != position.name:
                raise PassError(
                    "A cache does not hold each token in the slot of its position, so guesses cannot lie side by side",
                    where=describe(node),
                    fix="Use static_cache, and a model without sliding windows",
                )
        inputs = extend_contract(
            program,
            inputs=(
                InputSpec("slots", torch.int64, ("batch", "sequence"), "slot", position.high),
                InputSpec("tree_mask", torch.float32, ("sequence", "keys"), "tree_mask"),
            ),
        )
        with Editor(program, self.name, context.fuel) as editor:
            for node in program.calls(kv_cache_update.target):
                node.update_arg(2, inputs["slots"])
            first = next(program.calls(attention.target))
            mask = editor.call(aten.unsqueeze.default, inputs["tree_mask"], 0, before=first)
            mask = editor.call(aten.unsqueeze.default, mask, 0, before=first)
            for node in program.calls(attention.target):
                _bias(node, mask)
                editor.note(node, "tree mask")
            output = program.graph.output_node()
            made: Any = output.args[0]
            output.args = ((*made, head.args[0]),)
        contract = program.contract
        changed = program.with_(contract=contract.with_(outputs=(*contract.outputs, "hidden")))
        return PassResult(changed, editor.sites)

    def verify(self, before: Program, after: Program, context: Context) -> float:
        """Without guesses nothing has changed."""
        token = before.contract.input("token")
        ids = torch.randint(0, max(token.high, 2) if token else 2, (2, 5), generator=context.generator())
        mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
        found, expected = (one(**token_inputs(one, ids, mask))[0] for one in (after, before))
        return relative_error(found[mask.bool()], expected[mask.bool()])


def _bias(node: fx.Node, mask: fx.Node) -> None:
    if argument(node, "bias") is not None:
        raise PassError("An attention has a bias already", where=describe(node))
    node.args = (*node.args[:5], mask, *node.args[6:])
