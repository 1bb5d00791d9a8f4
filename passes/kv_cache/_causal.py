"""What every cache needs of a program: it is causal, and its positions are those of the tokens."""

import torch
from torch import fx

from graphwright.errors import PassError
from graphwright.evaluate import evaluate, index_domain
from graphwright.match import argument
from graphwright.ops import quantized_embedding, rope
from graphwright.program import Program
from graphwright.rewrite import describe

aten = torch.ops.aten


def require_causal(program: Program, layers: list[fx.Node]) -> None:
    """Refuses what no cache can serve.

    Raises:
        PassError: `program` is not a causal language model, or one of its attentions `layers` cannot follow a cache.
    """
    names = {spec.name for spec in program.contract.inputs}
    if not layers or "input_ids" not in names or names - {"input_ids", "attention_mask"}:
        raise PassError(
            f"{program.metadata.name} is not a causal language model of input_ids and attention_mask, so it has no "
            "key-value cache",
            fix="Use a recipe without a cache",
        )
    for node in layers:
        if not argument(node, "causal"):
            raise PassError(
                "An attention is not causal, so earlier outputs depend on later tokens", where=describe(node)
            )
        bias = argument(node, "bias")
        if bias is not None:
            raise PassError(
                "An attention adds a bias whose meaning is not known, so it cannot be extended over a cache",
                where=describe(bias),
            )


def position_nodes(program: Program) -> list[tuple[fx.Node, int]]:
    """Integer expressions of sizes and mask that rope or an embedding reads, each with its offset from positions.

    Raises:
        PassError: one of them is not `position + constant`.
    """
    domain = index_domain(program)
    wanted: dict[fx.Node, fx.Node] = {}
    for node in program.calls(rope.target, aten.embedding.default, quantized_embedding.target):
        source = node.args[0] if node.target is quantized_embedding.target else node.args[1]
        while isinstance(source, fx.Node) and source.target is aten.clamp.default and source.args[1] is None:
            source = source.args[0]  # positions with a limit: what is limited follows the cache
        if isinstance(source, fx.Node) and source in domain:
            wanted[source] = node
    return [(node, _offset(program, node, user)) for node, user in wanted.items()]


def _offset(program: Program, node: fx.Node, user: fx.Node) -> int:
    length = 6
    left = torch.tensor([[1] * length, [0, 0, *[1] * (length - 2)]])
    (full,) = evaluate(program, [node], batch=2, sequence=length, attention_mask=torch.ones_like(left))
    (padded,) = evaluate(program, [node], batch=2, sequence=length, attention_mask=left)
    steps = torch.arange(length)
    offset = int(full.flatten()[0])
    counted = (left.cumsum(1) - 1) + offset
    by_index = torch.equal(padded.expand(2, -1), (steps + offset).expand(2, -1))
    by_count = padded.shape[0] == 2 and torch.equal(padded[left.bool()], counted[left.bool()])
    if not torch.equal(full.expand(2, -1), (steps + offset).expand(2, -1)) or not (by_index or by_count):
        raise PassError(
            "Positions are not 0, 1, 2 … plus a constant, so they cannot follow a cache", where=describe(user)
        )
    return offset
