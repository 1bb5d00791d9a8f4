"""Experts stay in the artifact's file, and only those used lately are in memory.

    before                             after
    w, ids = moe_routing(logits, …)    w, ids = moe_routing(logits, …)
    y = experts(x, w, ids, …)          ids = fetch_experts(ids, layer, share, budget, guess)
                                       y = experts(x, w, ids, …)

The weights of a loaded artifact are mapped from its file. Behind each router the experts that it chose are asked for
ahead of their use, and those used least lately, of all layers, are let go when the budget is full. What the next layer
will choose is guessed by its router from this layer's tokens, and asked for too (Eliseev and Mazur 2023,
arXiv:2312.17238). Outputs are equal: an expert that is not in memory is read when it is needed.
"""

import operator

import torch
from pydantic import Field
from torch import fx

from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import experts, fetch_experts, moe_routing, quantized_experts
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import PASSING, changed
from graphwright.program import Program
from graphwright.rewrite import Editor

aten = torch.ops.aten


class OffloadExperts(Pass):
    """Limits the memory of experts."""

    name = "offload_experts"
    kind = "exact"
    paper = Paper(
        "EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models", "Yi et al.", 2023, "2308.14352"
    )
    requires = ("experts",)
    after = (
        "fewer_experts",
        "narrower_experts",
        "fewer_active_experts",
        "expert_capacity",
        "expert_choice",
        "shared_experts_fused",
        "quantized",
        "quantized_activations",
    )
    provides = ("offloaded_experts",)

    share: float = Field(0.25, ge=0, le=1, description="part of the experts' bytes that may be in memory")
    budget: int = Field(0, ge=0, description="bytes of experts that may be in memory, in the place of the share")
    ahead: bool = Field(True, description="guess what the next layer will choose, and ask for it early")

    def run(self, program: Program, context: Context) -> PassResult:
        """Puts a fetch before every layer of experts.

        Raises:
            PassError: the target is no CPU, or no memory is given.
        """
        if context.target.kind != "cpu":
            raise PassError(
                f"Experts are fetched on CPU targets only, and the target is {context.target.name}",
                fix="Compile for the target cpu, or leave offload_experts out",
            )
        if not self.share and not self.budget:
            raise PassError("No expert fits into a budget of 0 bytes", fix="Give share or budget")
        nodes = [
            node
            for node in program.calls(experts.target, quantized_experts.target)
            if argument(node, "indices").target is not fetch_experts.target
        ]
        routers = [_router(node) for node in nodes]
        guessed = 0
        with Editor(program, self.name, context.fuel) as editor:
            for layer, node in enumerate(nodes):
                if not editor.allow(node):
                    continue
                later = routers[layer + 1] if self.ahead and layer + 1 < len(nodes) else None
                guess = None if later is None else _guess(editor, node, later)
                guessed += guess is not None
                rest = (layer, self.share, self.budget, guess)
                indices = editor.call(fetch_experts, argument(node, "indices"), *rest, before=node)
                name = str(argument(node, "up").target)
                editor.replace(node, changed(editor, node, indices=indices), name)
        return PassResult(program, editor.sites, notes={"layers": len(editor.sites), "guessed_ahead": guessed})


def _router(node: fx.Node) -> fx.Node | None:
    """The `moe_routing` behind a layer of experts, if its logits are a linear layer."""
    router = argument(node, "indices")
    while router.target in PASSING:
        router = router.args[0]
    if router.target is not moe_routing.target or argument(router, "logits").target is not aten.linear.default:
        return None
    return router


def _guess(editor: Editor, node: fx.Node, later: fx.Node) -> fx.Node | None:
    """What the next layer's router would choose for this layer's tokens."""
    x, linear = argument(node, "x"), argument(later, "logits")
    operands = [value for value in linear.args[1:] if value is not None]
    if any(value.op != "get_attr" for value in operands):
        return None
    if operands[0].meta["val"].shape[1] != x.meta["val"].shape[1]:
        return None
    read = [editor.read(str(value.target), node) for value in operands]
    new: dict[str, fx.Node | int | None] = {"logits": editor.call(aten.linear.default, x, *read, before=node)}
    for name in ("correction_bias", "expert_of"):
        value = argument(later, name)
        new[name] = None if value is None else editor.read(str(value.target), node)
    # Shared experts are always in memory, and one who weighs them is not known yet.
    new |= {"num_shared": 0, "shared_weight": None}
    both = changed(editor, later, node, **new)
    return editor.call(operator.getitem, both, 1, before=node)
