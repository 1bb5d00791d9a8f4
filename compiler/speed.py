"""Speed of a compiled program on this machine: prefill and decode, medians over repetitions."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graphwright.backend import Executable
from graphwright.contract import Contract
from graphwright.errors import GraphwrightError
from graphwright.feeding import block_tables, pool_sizes


@dataclass(frozen=True)
class Speed:
    """Tokens per second at the given batch, prompt and cache lengths; medians."""

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)


class Stepper:
    """Calls a cached program step by step, with inputs made beforehand, for timing.

    Raises:
        GraphwrightError: the program has no cache, so there is nothing to step through.
    """

    def __init__(self, run: Executable, contract: Contract, batch: int, capacity: int, vocab_size: int) -> None:
        if not contract.state:
            raise GraphwrightError(
                "The program has no key-value cache, so decoding cannot be timed", fix="Use a recipe with static_cache"
            )
        self._run = run
        sizes = {"batch": batch, "capacity": capacity + 1, **pool_sizes(contract, batch, capacity)}
        self._state = contract.allocate(sizes)
        table = contract.input("block_table")
        if table is not None:
            self._state[table.name] = block_tables(table, batch, capacity)
        self._chosen = contract.input("logit_index") is not None
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, vocab_size, (batch, capacity), generator=generator)
        self._steps = torch.arange(capacity)

    def __call__(self, start: int, end: int) -> None:
        """Feeds tokens start … end-1 and asks for the last one's logits."""
        batch = self._ids.shape[0]
        tensors = {
            "input_ids": self._ids[:, start:end].contiguous(),
            "positions": self._steps[start:end].expand(batch, -1).contiguous(),
            "key_positions": self._steps[:end],
            **self._state,
        }
        if self._chosen:
            tensors["logit_index"] = torch.full((batch, 1), end - start - 1)
        self._run(tensors)


def measure(
    run: Executable,
    contract: Contract,
    vocab_size: int,
    *,
    batch: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repetitions: int = 3,
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
) -> Speed:
    """Times a prefill of `prompt_tokens` and `new_tokens` decode steps after 128 tokens, `repetitions` times."""
    context = min(128, prompt_tokens)
    capacity = max(prompt_tokens, context + new_tokens)
    step = Stepper(run, contract, batch, capacity, vocab_size)
    step(0, context)
    step(context, context + 1)
    prefill, decode = [], []
    for repetition in range(repetitions):
        progress("measure speed", repetition / repetitions)
        started = time.perf_counter()
        step(0, prompt_tokens)
        prefill.append(batch * prompt_tokens / (time.perf_counter() - started))
        for position in range(context, context + new_tokens):
            started = time.perf_counter()
            step(position, position + 1)
            decode.append(batch / (time.perf_counter() - started))
    return Speed(
        decode_tokens_per_second=statistics.median(decode),
        prefill_tokens_per_second=statistics.median(prefill),
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=torch.get_num_threads(),
    )
