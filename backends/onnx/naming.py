"""What tensors and dimensions are called in the file: the names that Optimum and onnxruntime-genai look for."""

import re
from typing import Any

import sympy
import torch

from graphwright.contract import Contract

INPUTS = {"key_mask": "attention_mask", "positions": "position_ids"}

DIMS = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past": "past_sequence_length",
    "total": "total_sequence_length",
}

CACHE = re.compile(r"(past|present)_(key|value)_(\d+)")


def tensor_name(name: str) -> str:
    """The file's name for an input or output of the contract.

    >>> tensor_name("past_key_3"), tensor_name("present_value_0"), tensor_name("positions")
    ('past_key_values.3.key', 'present.0.value', 'position_ids')
    """
    found = CACHE.fullmatch(name)
    if found is None:
        return INPUTS.get(name, name)
    when, kind, layer = found.groups()
    return f"{'past_key_values' if when == 'past' else 'present'}.{layer}.{kind}"


def tensor_names(contract: Contract) -> dict[str, str]:
    """The contract's names by the file's, inputs and outputs."""
    names = (*(spec.name for spec in contract.inputs), *contract.outputs)
    return {tensor_name(name): name for name in names}


def dim_name(size: Any, symbols: dict[str, str]) -> int | str:
    """A size as the file states it: a number, or an expression of named dimensions.

    Args:
        size: an int or a symbolic int.
        symbols: the contract's dimension for each shape symbol; see `graphwright.text.symbol_names`.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    named = {s: sympy.Symbol(symbols.get(str(s), str(s)), integer=True) for s in expression.free_symbols}
    known = expression.subs(named)
    past, sequence, total = (sympy.Symbol(name, integer=True) for name in ("past", "sequence", "total"))
    # The mask covers past and new tokens: their sum is its length.
    known = known.subs(past + sequence, total)
    return str(known.subs({s: sympy.Symbol(DIMS.get(str(s), str(s))) for s in known.free_symbols})).replace(" ", "")
