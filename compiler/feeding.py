"""Feeding tokens to a program, whatever its contract: cache-free or with caches, all logits or chosen ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from graphwright.contract import InputSpec
from graphwright.errors import GraphwrightError
from graphwright.program import Program


def token_inputs(
    program: Program, input_ids: Tensor, attention_mask: Tensor | None = None, *, state: bool = True
) -> dict[str, Tensor]:
    """Inputs, and fresh state if `state`, for one whole forward over `input_ids` [B, S] with right padding.

    Args:
        program: a language model's program.
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S], ones then zeros; None for no padding.
        state: whether to allocate the program's caches.

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
    return {**tensors, **program.contract.allocate(sizes)} if state else tensors


def batch_inputs(program: Program, batch: Mapping[str, Tensor], *, state: bool = True) -> dict[str, Tensor]:
    """Inputs for `program` from a batch of tokens, or the batch itself; with fresh state if `state`.

    Args:
        program: what will run.
        batch: `input_ids` [B, S] and perhaps `attention_mask`, or every input of the program by name.
        state: whether to add caches, or copies of those that the batch holds.
    """
    held = {spec.name for spec in program.contract.state}
    if set(batch) <= {"input_ids", "attention_mask"} and program.contract.input("token"):
        tensors = token_inputs(program, batch["input_ids"], batch.get("attention_mask"), state=state)
    else:
        tensors = {name: tensor.clone() if name in held else tensor for name, tensor in batch.items()}
    return tensors if state else {name: tensor for name, tensor in tensors.items() if name not in held}


def _fill(spec: InputSpec, input_ids: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
    if spec.role == "token":
        return input_ids
    if spec.role == "attention_mask":
        return mask
    if spec.role == "tree_mask":
        return torch.zeros(len(steps), len(steps))
    if spec.role in ("position", "slot"):
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
