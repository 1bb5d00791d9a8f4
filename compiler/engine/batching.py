"""Continuous batching over a paged cache: requests come and go, and share the steps of those that are there.

    scheduler = Scheduler(run, contract, metadata, blocks=256)
    first = scheduler.submit([5, 6, 7], max_new_tokens=20)
    while scheduler.busy:
        scheduler.step()                        # others may be submitted in between
    print(scheduler.tokens(first))

A request enters when there are blocks for its prompt, which runs alone; then it takes part in the batch, one token a
step (Yu et al. 2022, Orca; Kwon et al. 2023, arXiv:2309.06180). Where no block is free the request that came last gives
its own back, and goes on later: computed anew, or copied aside and back. Tokens are the most likely ones, the same that
each request would get alone.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graphwright.backend import SamplingExecutable
from graphwright.contract import Contract
from graphwright.engine.continuation import Row
from graphwright.engine.paging import BlockPool, OutOfBlocks, Pages
from graphwright.engine.prompts import check_request
from graphwright.engine.sampling import Sampler, Sampling, choose
from graphwright.errors import GenerationError
from graphwright.ops import sample_tokens
from graphwright.program import Metadata

Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


@dataclass
class _Request:
    number: int
    prompt: list[int]
    row: Row
    pages: Pages = field(default_factory=Pages)
    aside: dict[str, Tensor] | None = None
    """Contents of its blocks while it waits."""

    @property
    def tokens(self) -> list[int]:
        """Prompt and continuation."""
        return self.prompt + self.row.tokens


@dataclass
class Statistics:
    """What happened: decode steps, tokens, requests that had to wait for blocks, and slots that held no token."""

    steps: int = 0
    tokens: int = 0
    preempted: int = 0
    waste: list[float] = field(default_factory=list)

    @property
    def mean_waste(self) -> float:
        """Of the slots in held blocks, over all steps."""
        return sum(self.waste) / len(self.waste) if self.waste else 0.0


class Scheduler:
    """Serves requests from one pool of blocks.

    Args:
        run: a program with a paged cache.
        contract: its contract.
        metadata: of the model.
        blocks: of the pool, one of which is scratch.
        max_batch: requests in a step.
        preempt: what becomes of a request that gives its blocks back: `recompute` or `swap`.
        share: let requests that begin alike share blocks.
        debug: check the page tables before every step.
    """

    def __init__(
        self,
        run: Run,
        contract: Contract,
        metadata: Metadata,
        *,
        blocks: int,
        max_batch: int = 8,
        preempt: Literal["recompute", "swap"] = "recompute",
        share: bool = True,
        debug: bool = False,
    ) -> None:
        table = contract.input("block_table")
        rows = [spec.name for spec in contract.state if "blocks" not in spec.shape]
        if table is None or rows:
            raise GenerationError(
                f"{metadata.name} keeps {', '.join(rows[:2]) or 'no cache'} outside of pages",
                fix="Compile it with paged_cache; rings of sliding windows have no pages",
            )
        self.pool = BlockPool(blocks - 1, table.high, share=share)
        self.statistics = Statistics()
        self._run, self._contract, self._metadata = run, contract, metadata
        self._sample: Sampler = sample_tokens.reference
        if isinstance(run, SamplingExecutable):
            # Logits stay where they are made, and only tokens travel.
            self._run, self._sample = run.resident, run.sample
        self._names = {spec.role: spec.name for spec in contract.inputs}
        self._state = contract.allocate({"blocks": blocks}, getattr(run, "device", "cpu"))
        self._swaps, self._max_batch, self._debug = preempt == "swap", max_batch, debug
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._known: dict[int, _Request] = {}

    def submit(
        self, prompt: Sequence[int], max_new_tokens: int = 128, eos_token_ids: Sequence[int] | None = None
    ) -> int:
        """Adds a request, and returns its number.

        Raises:
            GenerationError: it cannot be served, not even alone.
        """
        tokens = list(prompt)
        check_request([tokens], max_new_tokens, self._contract, self._metadata)
        longest = len(tokens) + max_new_tokens - 1
        if self.pool.needed(longest) > self.pool.total:
            raise GenerationError(
                f"The request may come to {longest} tokens in the cache, and the pool holds "
                f"{self.pool.total * self.pool.block_size}: {self.pool.total} blocks of {self.pool.block_size}",
                fix="Use more blocks, or ask for fewer new tokens",
            )
        eos = frozenset(self._metadata.eos_token_ids if eos_token_ids is None else eos_token_ids)
        request = _Request(len(self._known), tokens, Row(max_new_tokens, eos, None))
        self._known[request.number] = request
        self._waiting.append(request)
        return request.number

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._waiting or self._running)

    def tokens(self, number: int) -> list[int]:
        """New tokens of a request so far."""
        return list(self._known[number].row.tokens)

    def run(self) -> list[list[int]]:
        """Serves everything; new tokens of all requests in the order in which they were submitted."""
        while self.busy:
            self.step()
        return [self.tokens(number) for number in self._known]

    @torch.no_grad()
    def step(self) -> None:
        """Lets waiting requests in while there is room, then adds a token to every running one.

        Raises:
            GraphwrightError: in debug mode, a page table is corrupt.
        """
        while self._waiting and len(self._running) < self._max_batch and self._enter(self._waiting[0]):
            self._waiting.popleft()
        for request in list(self._running):
            if request in self._running:
                self._make_room(request)
        if self._debug:
            self.pool.check([request.pages for request in self._running])
        if self._running:
            self._decode(self._running)

    def _enter(self, request: _Request) -> bool:
        """Gives a waiting request blocks, and computes its prompt or puts its cache back; whether there was room."""
        tokens = request.tokens
        pages = Pages(length=len(tokens) - 1) if request.aside else self.pool.admit(tokens)
        begin = pages.length
        try:
            self.pool.grow(pages, len(tokens) - 1 if request.aside else len(tokens))
            self._copy([] if request.aside else self.pool.own(pages, begin, len(tokens)))
        except OutOfBlocks:
            self.pool.release(pages)
            return False
        request.pages = pages
        self._running.append(request)
        if request.aside:
            for name, content in request.aside.items():
                self._state[name][pages.blocks] = content
            request.aside = None
            return True
        if self._debug:
            self.pool.check([r.pages for r in self._running])
        logits = self._forward([request], [tokens[begin:]], [begin])
        pages.length = len(tokens)
        self.pool.seal(pages, tokens)
        self._take(request, self._most_likely(logits)[0])
        return True

    def _make_room(self, request: _Request) -> None:
        """Makes sure that a running request may write its next token; those that came last give way."""
        while request in self._running:
            length = request.pages.length
            try:
                self.pool.grow(request.pages, length + 1)
                self._copy(self.pool.own(request.pages, length, length + 1))
            except OutOfBlocks:
                self._preempt(self._running[-1])
            else:
                return

    def _preempt(self, request: _Request) -> None:
        self._running.remove(request)
        blocks = request.pages.blocks[: self.pool.needed(request.pages.length)]
        if self._swaps:
            request.aside = {name: pool[blocks].clone() for name, pool in self._state.items()}
        self.pool.release(request.pages)
        self._waiting.appendleft(request)
        self.statistics.preempted += 1

    def _decode(self, requests: list[_Request]) -> None:
        logits = self._forward(requests, [r.tokens[-1:] for r in requests], [r.pages.length for r in requests])
        for request in requests:
            request.pages.length += 1
        self.statistics.steps += 1
        self.statistics.waste.append(self.pool.waste(request.pages for request in requests))
        for request, token in zip(list(requests), self._most_likely(logits), strict=True):
            if request.pages.length % self.pool.block_size == 0:
                self.pool.seal(request.pages, request.tokens)
            self._take(request, token)

    def _most_likely(self, logits: Tensor) -> list[int]:
        tokens: list[int] = choose(logits, Sampling(), torch.Generator(), None, self._sample).tolist()
        return tokens

    def _take(self, request: _Request, token: int) -> None:
        self.statistics.tokens += 1
        if request.row.push(token):
            self._running.remove(request)
            self.pool.release(request.pages)

    def _forward(self, requests: list[_Request], new: list[list[int]], starts: list[int]) -> Tensor:
        """Runs new tokens of each request; the logits [B, V] after the last of each."""
        width = max(map(len, new))
        ends = [start + len(tokens) for start, tokens in zip(starts, new, strict=True)]
        padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new])
        steps, lengths = torch.arange(width)[None], torch.tensor([[len(tokens)] for tokens in new])
        count = max(len(request.pages.blocks) for request in requests)
        tables = [r.pages.blocks + [-1] * (count - len(r.pages.blocks)) for r in requests]
        inputs = {
            "token": padded,
            "position": torch.where(steps < lengths, torch.tensor(starts)[:, None] + steps, -1),
            "key_position": torch.arange(max(ends)),
            "logit_index": lengths - 1,
            "block_table": torch.tensor(tables),
        }
        named = {self._names[role]: tensor for role, tensor in inputs.items() if role in self._names}
        logits = self._run({**self._state, **named})[0]
        if "logit_index" in self._names:
            return logits[:, 0]
        return logits[torch.arange(len(new)), lengths[:, 0] - 1]

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            for pool in self._state.values():
                pool[target] = pool[source]
