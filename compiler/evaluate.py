"""What a part of a graph means, by running it: masks and positions are functions of sizes and the attention mask.

    domain = index_domain(program)                      # nodes that no token and no activation reaches
    (mask,) = evaluate(program, [node], batch=2, sequence=7, attention_mask=ones)

A node that only asks for the shape of an activation is in the domain too: what it asks is answered from the symbolic
shape, without computing the activation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.contract import InputSpec, resolve
from graphwright.program import Program
from graphwright.rewrite import run_nodes
from graphwright.text import symbol_names

aten = torch.ops.aten

INDEX_ROLES = {"attention_mask", "position", "key_position"}

SHAPE_ONLY = {
    aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.new_empty.default,
}  # fmt: skip
"""Ops whose value depends on the shape and dtype of their first argument only."""


def index_domain(program: Program) -> set[fx.Node]:
    """Nodes whose value follows from sizes, constants, the attention mask and position inputs alone."""
    roles = {spec.name: spec.role for spec in program.contract.inputs}
    domain: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" or (node.op == "placeholder" and roles.get(str(node.target)) in INDEX_ROLES):
            domain.add(node)
        elif node.op == "call_function" and _is_pure(node):
            sources = node.all_input_nodes
            read = [n for n in sources if n is not node.args[0]] if node.target in SHAPE_ONLY else sources
            if all(source in domain for source in read):
                domain.add(node)
    return domain


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def evaluate(
    program: Program,
    nodes: Sequence[fx.Node],
    *,
    batch: int = 2,
    sequence: int = 7,
    attention_mask: Tensor | None = None,
    sizes: Mapping[str, int] | None = None,
) -> list[Any]:
    """The values of nodes of the index domain at concrete sizes.

    Args:
        program: the program that holds them.
        nodes: nodes of `index_domain(program)`.
        batch: size of the dimension called batch.
        sequence: size of the dimension called sequence.
        attention_mask: value of the attention mask; ones when left out.
        sizes: sizes of other dimensions, by name; these win.
    """
    concrete = program.contract.sizes({"batch": batch, "sequence": sequence, **(sizes or {})})
    bound: dict[fx.Node, Any] = {}
    specs = {spec.name: spec for spec in program.contract.inputs}
    domain = index_domain(program)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node in domain:
            bound[node] = _input(specs[str(node.target)], concrete, attention_mask)
        elif node.target in SHAPE_ONLY and node.args[0] not in domain:
            source = node.args[0]
            value = source.meta["val"]
            bound[source] = torch.zeros((), dtype=value.dtype).expand(shape_at(program, source, concrete))
    return run_nodes(program, list(nodes), bound)


def shape_at(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a node's value when the contract's dimensions have these sizes."""
    return tuple(size_at(program, size, sizes) for size in node.meta["val"].shape)


def dims_of(program: Program, size: Any) -> set[str]:
    """Names of the contract's dimensions that a symbolic size depends on."""
    names = symbol_names(program.graph, program.contract)
    symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
    return {names[str(symbol)] for symbol in symbols if str(symbol) in names}


def size_at(program: Program, size: Any, sizes: Mapping[str, int]) -> int:
    """A symbolic size when the contract's dimensions have these sizes."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    names = symbol_names(program.graph, program.contract)
    expression = size.node.expr
    return int(expression.subs({s: sizes[names[str(s)]] for s in expression.free_symbols}))


def _input(spec: InputSpec, sizes: Mapping[str, int], attention_mask: Tensor | None) -> Tensor:
    shape = resolve(spec.shape, sizes)
    if spec.role != "attention_mask":
        return torch.arange(shape[-1]).expand(shape).to(spec.dtype)
    return torch.ones(shape, dtype=spec.dtype) if attention_mask is None else attention_mask.to(spec.dtype)
