"""Peers to measure against in one process, taking turns: eager Hugging Face, torch.compile with a static cache, us.

Every peer is timed at the same two things: the prefill of a prompt, and decode steps behind a shorter one.
`interleaved` runs them round by round, so that a slow minute of the machine hits all of them alike.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from graphwright.accuracy import Logits
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


Step = Callable[[int, int], None]
"""`step(start, end)` feeds tokens start … end-1 on top of what the cache holds."""

Round = Callable[[int, int], tuple[float, list[float]]]
"""(prompt tokens, new tokens) -> seconds of the prefill, and of each decode step behind `CONTEXT` tokens."""


@dataclass
class Peer:
    """Somebody to time."""

    name: str
    weight_bytes: int
    make: Callable[[int], Round]
    """From a capacity to what times one round."""
    logits: Logits | None = None
    """Token ids [1, S] to logits [1, S, vocabulary], where a peer gives them."""
    batch: int = 1
    """Sequences per step."""

    @staticmethod
    def stepping(name: str, weight_bytes: int, make: Callable[[int], Step], logits: Logits) -> "Peer":
        """A peer that is called step by step."""
        return Peer(name, weight_bytes, lambda capacity: partial(_timed_steps, make(capacity)), logits)

    @staticmethod
    def of_artifact(name: str, compiled: Compiled, batch: int = 1) -> "Peer":
        """An artifact of ours; its logits, which do not depend on the batch, are given once."""
        weights = sum(tensor.nbytes for tensor in compiled.program.weights().values())
        contract, vocabulary = compiled.program.contract, compiled.program.metadata.vocab_size
        make = lambda size: partial(_timed_steps, Stepper(compiled.executable, contract, batch, size, vocabulary))  # noqa: E731
        return Peer(name, weights, make, compiled.logits if batch == 1 else None, batch)


def _timed_steps(step: Step, prompt_tokens: int, new_tokens: int) -> tuple[float, list[float]]:
    def seconds(start: int, end: int) -> float:
        started = time.perf_counter()
        step(start, end)
        return time.perf_counter() - started

    prefill = seconds(0, prompt_tokens)
    step(0, CONTEXT)
    return prefill, [seconds(place, place + 1) for place in range(CONTEXT, CONTEXT + new_tokens)]


def _bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def HuggingFace(model: Any) -> Peer:  # noqa: N802
    """Eager, with the static cache that compiled peers use too."""
    make = lambda capacity: _stepper(model, model, capacity)  # noqa: E731
    return Peer.stepping("transformers eager", _bytes(model), make, lambda ids: model(input_ids=ids).logits)


def TorchCompile(model: Any) -> Peer:  # noqa: N802
    """torch.compile of the same model with a static cache: the step is static, the prefill dynamic."""
    step = torch.compile(model, dynamic=False, fullgraph=True)
    make = lambda capacity: _stepper(model, step, capacity)  # noqa: E731
    return Peer.stepping("torch.compile", _bytes(model), make, lambda ids: model(input_ids=ids).logits)


def _stepper(model: Any, step: Any, capacity: int) -> Step:
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

    def make(capacity: int) -> Step:
        threads = torch.get_num_threads()
        model = Llama(str(file), n_ctx=capacity, n_threads=threads, n_threads_batch=threads, verbose=False)
        ids = torch.randint(0, model.n_vocab(), (capacity,), generator=torch.Generator().manual_seed(0)).tolist()

        def run(start: int, end: int) -> None:
            if start == 0:
                model.reset()
            model.eval(ids[start:end])

        return run

    def logits(ids: torch.Tensor) -> torch.Tensor:
        model = Llama(str(file), n_ctx=ids.shape[1], logits_all=True, verbose=False)
        model.eval(ids[0].tolist())
        return torch.from_numpy(model.scores[: ids.shape[1]].copy())[None]

    return Peer.stepping(f"llama.cpp {file.stem}", file.stat().st_size, make, logits)


def OpenVino(file: Path) -> Peer:  # noqa: N802
    """OpenVINO GenAI on a GGUF file; needs the package openvino-genai (extra `bench`).

    It takes no single steps, so its own measurements are read; they include the choice of the next token.
    """
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(file), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)

    def generate(tokens: int, new_tokens: int) -> Any:
        # A prompt that was seen before would be answered from the prefix cache.
        ids = torch.randint(0, 40000, (1, tokens), generator=generator).numpy()
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor((ids >= 0).astype("int64")))
        options = {"max_new_tokens": new_tokens, "ignore_eos": True, "do_sample": False}
        return pipeline.generate(inputs, **options).perf_metrics

    def one_round(prompt_tokens: int, new_tokens: int) -> tuple[float, list[float]]:
        prefill = generate(prompt_tokens, 1).get_ttft().mean / 1e3
        times = generate(CONTEXT, new_tokens + 1).raw_metrics.m_new_token_times
        return prefill, [(after - before) / 1e3 for before, after in pairwise(times)]

    return Peer(f"OpenVINO {file.stem}", file.stat().st_size, lambda _capacity: one_round)


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
    rounds_of = {peer.name: peer.make(capacity) for peer in peers}
    timings = {peer.name: Timing() for peer in peers}
    for number in range(rounds + 1):
        for peer in peers:
            prefill, steps = rounds_of[peer.name](prompt_tokens, new_tokens if number else 2)
            if number:
                timings[peer.name].prefill_samples.append(peer.batch * prompt_tokens / prefill)
                timings[peer.name].decode_samples += [peer.batch / seconds for seconds in steps]
        progress(f"round {number} of {rounds} done" if number else "warmed up")
    return timings
