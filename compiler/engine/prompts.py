"""What was asked, as one ragged batch of token lists: the only place that knows the forms a prompt may have."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.contract import Contract
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import GenerationError
from graphwright.program import Metadata


def read_prompts(
    prompts: Any, tokenizer: Tokenizer | None, *, chat: bool = False, attention_mask: Tensor | None = None
) -> list[list[int]]:
    """Tokens of every prompt.

    Args:
        prompts: a text; texts; tokens; lists of tokens; an integer matrix [B, S]; with `chat` also one conversation (a
            list of messages) or several.
        tokenizer: needed for text.
        chat: put texts and conversations in the model's chat template.
        attention_mask: [B, S], 0 where a matrix holds padding, on either side.

    Raises:
        GenerationError: prompts of no known form, or text without a tokenizer.
    """
    if isinstance(prompts, Tensor):
        return _from_matrix(prompts, attention_mask)
    if attention_mask is not None:
        raise GenerationError("An attention mask was given without a matrix of tokens", fix="Lists need no padding")
    if isinstance(prompts, str):
        return [_from_text(prompts, tokenizer, chat)]
    if not isinstance(prompts, Sequence):
        raise _unknown(prompts)
    rows = list(prompts)
    if rows and all(isinstance(row, dict) for row in rows):
        return [_from_text(rows, tokenizer, chat)]
    if rows and all(_is_token(row) for row in rows):
        return [list(rows)]
    return [_row(row, tokenizer, chat) for row in rows]


def check_request(rows: list[list[int]], new_tokens: int, contract: Contract, metadata: Metadata) -> None:
    """Refuses what the program cannot serve, before anything is allocated.

    Raises:
        GenerationError: naming the prompt, its size and the limit.
    """
    if not rows:
        raise GenerationError("There is no prompt", fix="Give at least one")
    if new_tokens < 1:
        raise GenerationError(f"max_new_tokens is {new_tokens}", fix="Ask for at least one new token")
    _check_batch(len(rows), contract)
    token = contract.input("token")
    vocabulary = metadata.vocab_size or (token.high if token else 0)
    limit = _longest(contract, metadata)
    for index, row in enumerate(rows):
        if not row:
            raise GenerationError(f"Prompt {index} is empty", fix="Give at least one token, such as the start token")
        if min(row) < 0 or (vocabulary and max(row) >= vocabulary):
            wrong = min(row) if min(row) < 0 else max(row)
            raise GenerationError(
                f"Prompt {index} holds token {wrong}, and the model knows 0 to {vocabulary - 1}",
                fix="Encode the prompt with this model's own tokenizer",
            )
        if limit:
            _check_length(index, len(row), new_tokens, limit)


def _longest(contract: Contract, metadata: Metadata) -> int:
    """The longest text that the program continues; 0 where caches forget and positions have no bound."""
    place = contract.input("position")
    if contract.input("key_position") is None and place is not None:
        return place.high
    return metadata.context_length or contract.dim("keys").max


def _check_length(index: int, length: int, new_tokens: int, limit: int) -> None:
    if length >= limit:
        raise GenerationError(
            f"Prompt {index} has {length} tokens, and the model's context of {limit} leaves no room to continue it",
            fix=f"Shorten it to at most {limit - 1} tokens",
        )
    if length + new_tokens > limit:
        raise GenerationError(
            f"Prompt {index} has {length} tokens, which with {new_tokens} new ones is more than the model's context of "
            f"{limit}",
            fix=f"Ask for at most {limit - length} new tokens, or shorten the prompt",
        )


def _check_batch(batch: int, contract: Contract) -> None:
    token = contract.input("token")
    size = token.shape[0] if token else "batch"
    low, high = (size, size) if isinstance(size, int) else (contract.dim(size).min, contract.dim(size).max)
    if not low <= batch <= high:
        raise GenerationError(
            f"There are {batch} prompts, and the program takes {low if low == high else f'{low} to {high}'} at once",
            fix="Split them over several calls",
        )


def _from_matrix(tokens: Tensor, mask: Tensor | None) -> list[list[int]]:
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2:
        kind = str(tokens.dtype).removeprefix("torch.")
        raise GenerationError(
            f"A tensor of tokens must be int64 [batch, sequence]; this is {kind}{list(tokens.shape)}",
            fix="Convert it with tokens.long(), or add the missing dimension with tokens[None]",
        )
    if mask is None:
        return [[int(token) for token in row] for row in tokens.tolist()]
    if mask.shape != tokens.shape:
        raise GenerationError(
            f"The attention mask is {list(mask.shape)} and the tokens are {list(tokens.shape)}",
            fix="Give one mask value for every token",
        )
    return [row[keep].tolist() for row, keep in zip(tokens, mask.bool(), strict=True)]


def _row(row: Any, tokenizer: Tokenizer | None, chat: bool) -> list[int]:
    if isinstance(row, str):
        return _from_text(row, tokenizer, chat)
    if isinstance(row, Tensor) and row.dim() == 1 and not row.is_floating_point():
        return [int(token) for token in row.tolist()]
    if not isinstance(row, Sequence):
        raise _unknown(row)
    if row and all(isinstance(message, dict) for message in row):
        return _from_text(list(row), tokenizer, chat)
    for token in row:
        if not _is_token(token):
            raise GenerationError(
                f"A list of tokens holds {type(token).__name__} {token!r:.40}", fix="Give a text, or integers only"
            )
    return list(row)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _from_text(text: Any, tokenizer: Tokenizer | None, chat: bool) -> list[int]:
    if tokenizer is None:
        raise GenerationError(
            "A prompt is text, and the program has no tokenizer",
            fix="Give lists of token ids, or compile the model together with its tokenizer",
        )
    return tokenizer.encode(text, chat=chat)


def _unknown(found: Any) -> GenerationError:
    return GenerationError(
        f"A prompt cannot be made of {type(found).__name__}",
        fix="Give a text, a list of texts, lists of token ids, or an int64 tensor [batch, sequence]",
    )
