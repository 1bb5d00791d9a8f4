"""Feeding tokens to a program, whatever its contract: cache-free or with caches, all logits or chosen ones."""

import torch
from torch import Tensor

from graphwright.contract import InputSpec
from graphwright.errors import GraphwrightError
from graphwright.program import Program


def token_inputs(program: Program, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Inputs and fresh state for one whole forward over `input_ids` [B, S] with right padding.

    Args:
        program: a language model's program.
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S], ones then zeros; None for no padding.

    Raises:
        GraphwrightError: the program takes an input that tokens do not determine.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    length = input_ids.shape[1]
    steps = torch.arange(length)
    tensors = {}
    for spec in program.contract.inputs:
        tensors[spec.name] = _fill(spec, input_ids, mask, steps)
    sizes = {"batch": input_ids.shape[0], "capacity": length + 1}
    return {**tensors, **program.contract.allocate(sizes)}


def _fill(spec: InputSpec, input_ids: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
    if spec.role == "token":
        return input_ids
    if spec.role == "attention_mask":
        return mask
    if spec.role == "position":
        return torch.where(mask.bool(), steps, -1)
    if spec.role == "key_position":
        return steps
    if spec.role == "logit_index":
        return steps.expand(input_ids.shape).contiguous()
    raise GraphwrightError(
        f"Input {spec.name} is not a token input, so tokens alone do not feed this program",
        fix="Call the program with all its inputs by name",
    )


def logits_of(program: Program, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, S, vocabulary] of one whole forward."""
    return program(**token_inputs(program, input_ids, attention_mask))[0]
