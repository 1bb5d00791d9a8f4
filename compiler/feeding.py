"""Feeding tokens to a program, whatever its contract: cache-free or with caches, all logits or chosen ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.contract import Contract, InputSpec
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
    sizes = {"batch": input_ids.shape[0], "capacity": length + 1, **pool_sizes(program.contract, len(mask), length)}
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
    if spec.role == "block_table":
        return block_tables(spec, *input_ids.shape)
    if spec.role == "logit_index":
        return steps.expand(input_ids.shape).contiguous()
    raise GraphwrightError(
        f"Input {spec.name} is not a token input, so tokens alone do not feed this program",
        fix="Call the program with all its inputs by name",
    )


def last_logits(call: Callable[..., Any], program: Program, input_ids: Tensor, count: int) -> Tensor:
    """Logits [B, count, vocabulary] of the last `count` tokens of `input_ids` [B, S], in one forward.

    Args:
        call: what runs `program`: itself, or its compiled form.
        program: whose inputs are filled; where it takes `logit_index`, no other logits are computed.
        input_ids: int64 [B, S].
        count: at most S.
    """
    tensors = token_inputs(program, input_ids)
    chosen = program.contract.input("logit_index")
    if chosen is not None:
        tensors[chosen.name] = tensors[chosen.name][:, -count:].contiguous()
    logits: Tensor = call(**tensors)[0]
    return logits[:, -count:]


def block_tables(spec: InputSpec, batch: int, length: int) -> Tensor:
    """Tables of `batch` rows with room for `length` tokens each, one behind the other, [B, M]."""
    each = -(-length // spec.high)
    return torch.arange(batch * each).reshape(batch, each)


def pool_sizes(contract: Contract, batch: int, length: int) -> dict[str, int]:
    """The size of pools for those tables; nothing for a program without."""
    spec = contract.input("block_table")
    return {"blocks": batch * -(-length // spec.high) + 1} if spec else {}


def logits_in_chunks(program: Program, input_ids: Tensor, attention_mask: Tensor | None, ends: Sequence[int]) -> Tensor:
    """Logits [B, S, vocabulary] of `input_ids` [B, S] fed to a program with caches in chunks, which end at `ends`."""
    everything = token_inputs(program, input_ids, attention_mask)
    state = {spec.name: everything[spec.name] for spec in program.contract.state}
    parts, start = [], 0
    for end in ends:
        chunk = {spec.name: _chunk(spec, everything[spec.name], start, end) for spec in program.contract.inputs}
        parts.append(program(**chunk, **state)[0])
        start = end
    return torch.cat(parts, dim=1)


def _chunk(spec: InputSpec, value: Tensor, start: int, end: int) -> Tensor:
    if spec.role == "key_position":
        return value[:end]
    if spec.role == "block_table":
        return value
    if spec.role == "tree_mask":
        return value[start:end, :end]
    return value[:, : end - start] if spec.role == "logit_index" else value[:, start:end]


def logits_of(program: Program, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, S, vocabulary] of one whole forward."""
    return program(**token_inputs(program, input_ids, attention_mask))[0]
