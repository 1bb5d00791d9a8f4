"""The cost model: FLOPs, bytes and roofline time, symbolic in the contract's dimensions (Williams et al. 2009).

    total = program_cost(program)                    # sympy expressions in batch, sequence, keys …
    estimate = roofline(program, target, {"batch": 1, "sequence": 1, "keys": 512})

A semantic op states its cost beside its definition; ATen ops are covered here. The time of a node is the larger of
FLOPs over peak rate and bytes over memory bandwidth; nodes run one after another. It is a model, not a forecast: a
machine whose caches hold the weights is faster, and most kernels are slower.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright import packing
from graphwright.contract import dtype_name
from graphwright.match import argument
from graphwright.op import Cost, TensorInfo, op_of
from graphwright.ops import quantize_dequantize, quantized_linear
from graphwright.program import Program
from graphwright.target import Target
from graphwright.text import op_name, symbol_names

aten = torch.ops.aten

VIEWS = {
    "reshape", "transpose", "permute", "slice", "expand", "unsqueeze", "squeeze", "getitem", "split", "chunk",
    "split_with_sizes", "select", "t", "numpy_T", "sym_size", "unbind", "view_as_complex", "view_as_real",
}  # fmt: skip
"""Ops that move no data."""


@dataclass(frozen=True)
class NodeCost:
    """One node's work: sympy expressions in dimension names."""

    node: str
    op: str
    flops: sympy.Expr
    bytes: sympy.Expr
    dtype: str


@dataclass(frozen=True)
class Estimate:
    """A roofline estimate at concrete sizes."""

    flops: float
    bytes: float
    seconds: float
    memory_bound_share: float


def node_costs(program: Program) -> list[NodeCost]:
    """The cost of every call in graph order."""
    names = symbol_names(program.graph, program.contract)
    symbols = {symbol: sympy.Symbol(name, positive=True, integer=True) for symbol, name in names.items()}
    return [_node_cost(node, symbols) for node in program.calls()]


def program_cost(program: Program) -> Cost:
    """The sum over all nodes."""
    costs = node_costs(program)
    return Cost(sympy.Add(*(c.flops for c in costs)), sympy.Add(*(c.bytes for c in costs)))


def roofline(program: Program, target: Target, sizes: Mapping[str, int]) -> Estimate:
    """FLOPs, bytes and the modelled time of one call at `sizes` on `target`."""
    bound = {sympy.Symbol(n, positive=True, integer=True): s for n, s in program.contract.sizes(sizes).items()}
    # Layers repeat, and so do their expressions, of which sympy takes long to evaluate one.
    value = functools.cache(lambda expression: float(expression.subs(bound)))
    flops = total_bytes = seconds = memory_seconds = 0.0
    for cost in node_costs(program):
        work, moved = value(cost.flops), value(cost.bytes)
        rate = target.flops.get(cost.dtype) or target.flops.get("float32") or 1e12
        compute_time, memory_time = work / rate, moved / (target.bandwidth or 1e12)
        flops, total_bytes = flops + work, total_bytes + moved
        seconds += max(compute_time, memory_time)
        memory_seconds += memory_time if memory_time >= compute_time else 0.0
    return Estimate(flops, total_bytes, seconds, memory_seconds / seconds if seconds else 0.0)


def _node_cost(node: fx.Node, symbols: Mapping[str, sympy.Symbol]) -> NodeCost:
    output = _info(node.meta.get("val"), symbols)
    cost = _cost(node, symbols, output)
    moved = cost.bytes
    if moved is None:
        inputs = [_info(n.meta.get("val"), symbols) for n in node.all_input_nodes]
        moved = sum(
            (i.bytes for group in (inputs, [output]) for i in group if i is not None),
            sympy.Integer(0),
        )
    dtype = _computed_in(node, output)
    return NodeCost(node.name, op_name(node.target), sympy.sympify(cost.flops), sympy.sympify(moved), dtype)


def _computed_in(node: fx.Node, output: TensorInfo | None) -> str:
    """The name of the dtype whose rate a node's arithmetic has."""
    x = node.args[0] if node.args else None
    if node.target is quantized_linear.target and isinstance(x, fx.Node) and x.target is quantize_dequantize.target:
        floating = packing.FORMATS[argument(x, "format")].dtype  # codes of both sides are multiplied
        return "int8" if floating is None else dtype_name(floating)
    return dtype_name(output.dtype) if output is not None else "float32"


def _cost(node: fx.Node, symbols: Mapping[str, sympy.Symbol], output: TensorInfo | None) -> Cost:
    semantic = op_of(node.target)
    if semantic is not None:
        args = [_info_or_value(argument, symbols) for argument in node.args]
        kwargs = {key: _info_or_value(value, symbols) for key, value in node.kwargs.items()}
        return semantic.cost_of(*args, **kwargs)
    name = op_name(node.target).partition(".")[0]
    if name in VIEWS or output is None:
        return Cost(0, 0)
    if name == "embedding":
        return Cost(0, 2 * output.bytes)
    first = _info(node.args[0].meta.get("val"), symbols) if node.args and isinstance(node.args[0], fx.Node) else None
    if name in ("linear", "matmul", "mm", "bmm", "_grouped_mm") and first is not None:
        return Cost(2 * output.numel * first.shape[-1])
    if name in ("addmm", "baddbmm"):
        second = _info(node.args[1].meta.get("val"), symbols)
        return Cost(2 * output.numel * second.shape[-1]) if second else Cost()
    if name == "scaled_dot_product_attention" and first is not None:
        key = _info(node.args[1].meta.get("val"), symbols)
        return Cost(4 * first.numel * key.shape[-2]) if key else Cost()
    return Cost(output.numel)


def _info(value: Any, symbols: Mapping[str, sympy.Symbol]) -> TensorInfo | None:
    if not isinstance(value, torch.Tensor):
        return None
    return TensorInfo(tuple(_expression(size, symbols) for size in value.shape), value.dtype)


def _info_or_value(argument: Any, symbols: Mapping[str, sympy.Symbol]) -> Any:
    if isinstance(argument, fx.Node):
        value = argument.meta.get("val")
        return _info(value, symbols) or value
    return argument


def _expression(size: Any, symbols: Mapping[str, sympy.Symbol]) -> sympy.Expr:
    if not isinstance(size, torch.SymInt):
        return sympy.Integer(int(size))
    expression = size.node.expr
    return expression.subs({s: symbols[str(s)] for s in expression.free_symbols if str(s) in symbols})
