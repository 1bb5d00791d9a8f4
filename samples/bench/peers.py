"""Peers to measure against in one process, taking turns: eager Hugging Face, torch.compile with a static cache, us.

Every peer offers the same two things: a prefill of some tokens, and one decode step at a position. `interleaved` runs
them round by round, so that a slow minute of the machine hits all of them alike, and reports medians.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from graphwright.compiled import Compiled
from graphwright.speed import Stepper

CONTEXT = 128
"""Tokens in the cache before decoding is timed."""


@dataclass
class Timing:
    """Tokens per second: medians, and every sample."""

    prefill_samples: list[float] = field(default_factory=list)
    decode_samples: list[float] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        """Median prefill speed."""
        return statistics.median(self.prefill_samples)

    @property
    def decode(self) -> float:
        """Median decode speed."""
        return statistics.median(self.decode_samples)


@dataclass
class Peer:
    """Somebody to time. `step(start, end)` feeds tokens start … end-1 on top of what the cache holds."""

    name: str
    weight_bytes: int
    make: Callable[[int], Callable[[int, int], None]]
    """From a capacity to a `step`."""

    @staticmethod
    def of_artifact(name: str, compiled: Compiled) -> "Peer":
        """An artifact of ours."""
        weights = sum(tensor.nbytes for tensor in compiled.program.weights().values())
        contract, vocabulary = compiled.program.contract, compiled.program.metadata.vocab_size
        return Peer(name, weights, lambda capacity: Stepper(compiled.executable, contract, 1, capacity, vocabulary))


def _bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def HuggingFace(model: Any) -> Peer:  # noqa: N802
    """Eager, with the static cache that compiled peers use too."""
    return Peer("transformers eager", _bytes(model), lambda capacity: _stepper(model, model, capacity))


def TorchCompile(model: Any) -> Peer:  # noqa: N802
    """torch.compile of the same model with a static cache: the step is static, the prefill dynamic."""
    step = torch.compile(model, dynamic=False, fullgraph=True)
    return Peer("torch.compile", _bytes(model), lambda capacity: _stepper(model, step, capacity))


def _stepper(model: Any, step: Any, capacity: int) -> Callable[[int, int], None]:
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, capacity), generator=generator)
    # The compiled step must find its cache allocated, or it would be traced twice.
    with torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    def run(start: int, end: int) -> None:
        with torch.no_grad():
            if start == 0:
                cache.reset()
            positions = torch.arange(start, end)
            step(
                input_ids=ids[:, start:end],
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )

    return run


def LlamaCpp(file: Path) -> Peer:  # noqa: N802
    """llama.cpp on a GGUF file; needs the package llama-cpp-python (extra `bench`)."""
    from llama_cpp import Llama

    def make(capacity: int) -> Callable[[int, int], None]:
        threads = torch.get_num_threads()
        model = Llama(str(file), n_ctx=capacity, n_threads=threads, n_threads_batch=threads, verbose=False)
        ids = torch.randint(0, model.n_vocab(), (capacity,), generator=torch.Generator().manual_seed(0)).tolist()

        def run(start: int, end: int) -> None:
            if start == 0:
                model.reset()
            model.eval(ids[start:end])

        return run

    return Peer(f"llama.cpp {file.stem}", file.stat().st_size, make)


def read_bandwidth(repetitions: int = 5) -> float:
    """Bytes per second that all threads read from memory: the best of some sums over half a gigabyte."""
    data = torch.ones(1 << 27)
    best = 0.0
    for _ in range(repetitions):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def interleaved(
    peers: list[Peer],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda _text: None,
) -> dict[str, Timing]:
    """Times all peers, round by round; the first round warms up and is not counted."""
    capacity = max(prompt_tokens, CONTEXT + new_tokens)
    steps = {peer.name: peer.make(capacity) for peer in peers}
    timings = {peer.name: Timing() for peer in peers}
    for number in range(rounds + 1):
        for peer in peers:
            step, timing = steps[peer.name], timings[peer.name] if number else Timing()
            started = time.perf_counter()
            step(0, prompt_tokens)
            timing.prefill_samples.append(prompt_tokens / (time.perf_counter() - started))
            step(0, CONTEXT)
            for position in range(CONTEXT, CONTEXT + (new_tokens if number else 2)):
                started = time.perf_counter()
                step(position, position + 1)
                timing.decode_samples.append(1 / (time.perf_counter() - started))
        progress(f"round {number} of {rounds} done" if number else "warmed up")
    return timings
