"""The same computation in float32, to tell a rewrite's mistake from the rounding of a narrow dtype."""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx

from graphwright.contract import InputSpec, StateSpec
from graphwright.program import Program
from graphwright.serialize import set_attribute

NARROW = (torch.bfloat16, torch.float16)
Spec = TypeVar("Spec", InputSpec, StateSpec)


def widened(program: Program) -> Program:
    """A copy of `program` whose bfloat16 and float16 weights, inputs, state and casts are float32."""
    copy = program.clone()
    for name, weight in copy.weights().items():
        if weight.dtype in NARROW:
            set_attribute(copy.module, name, weight.float())
    for node in copy.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _wide)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _wide)
    copy.module.recompile()
    contract = program.contract
    contract = contract.with_(
        inputs=tuple(_wide_spec(spec) for spec in contract.inputs),
        state=tuple(_wide_spec(spec) for spec in contract.state),
    )
    return Program(copy.module, contract, program.metadata, program.history)


def _wide(argument: Any) -> Any:
    return torch.float32 if argument in NARROW else argument


def _wide_spec(spec: Spec) -> Spec:
    return replace(spec, dtype=_wide(spec.dtype))
