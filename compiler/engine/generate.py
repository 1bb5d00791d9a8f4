"""Generation: a prefill over the prompts, then one token of every prompt per step, over a program with caches.

    generator = Generator(run, program.contract, program.metadata, tokenizer)
    print(generator.generate("The capital of France is", max_new_tokens=20).texts[0])
    for piece in generator.stream("Once upon a time"):
        print(piece, end="", flush=True)

Prompts of one batch may differ in length: `positions` gives each token its place in its own sequence and -1 to what is
not a token, padding and the rows that have ended. Nothing in the step is proportional to the size of the program.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from graphwright.backend import SamplingExecutable
from graphwright.contract import Contract
from graphwright.engine.continuation import Row
from graphwright.engine.medusa import MedusaHeads
from graphwright.engine.prompts import check_request, read_prompts
from graphwright.engine.sampling import Sampler, Sampling, choose, distribution, draw, seen_tokens
from graphwright.engine.speculative import Drafter, ModelDrafter, PromptLookup, accept
from graphwright.engine.tokenizer import Tokenizer
from graphwright.engine.tree import Tree, best_path, likely_tree
from graphwright.errors import GenerationError, nearest
from graphwright.feeding import block_tables, pool_sizes
from graphwright.ops import sample_tokens
from graphwright.program import Metadata

Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
"""Runs a program once: inputs and state by name, state written in place, logits first among the outputs."""

PROMPT_LOOKUP = "prompt-lookup"
"""The draft that guesses from the text itself."""

STEP_ROLES = frozenset({"token", "position", "key_position", "logit_index", "block_table", "slot", "tree_mask"})


@dataclass
class Timing:
    """What generation took. `tokens_per_second` is the rate of decoding, prefill and first tokens left out.

    Of the `drafted_tokens` that a drafter guessed, `accepted_tokens` held.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    tokens_per_second: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class GenerationResult:
    """Continuations in the order of the prompts.

    Attributes:
        texts: without special tokens, cut before a stop text; None without a tokenizer.
        tokens: all new tokens, with the end-of-sequence token or those of a stop text.
        finish_reasons: `eos`, `stop` (a stop text) or `length`.
        timing: seconds and tokens of the whole batch.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    finish_reasons: list[str]
    timing: Timing = field(default_factory=Timing)


class Generator:
    """Continues prompts with a program that has caches."""

    def __init__(self, run: Run, contract: Contract, metadata: Metadata, tokenizer: Tokenizer | None = None) -> None:
        self.run = run
        self.contract = contract
        self.metadata = metadata
        self.tokenizer = tokenizer

    def generate(self, prompts: Any, **options: Any) -> GenerationResult:
        """Continues every prompt, all in one batch.

        Args:
            prompts: a text, texts, tokens, lists of tokens, or an int64 tensor [B, S]; with `chat` conversations too.
            **options: the fields of `Options`: max_new_tokens=128, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
                repetition_penalty=1.0, seed=0, stop=(), eos_token_ids=None, chat=False, attention_mask=None,
                draft=None, draft_tokens=5. A draft is `prompt-lookup`, a compiled program whose guesses are checked, or
                Medusa heads, whose `draft_tokens` guesses form a tree.

        Raises:
            GenerationError: the request cannot be served; nothing has been run.
        """
        decoding = self._start(prompts, Options.of(options), stream=False)
        for _ in decoding:
            pass
        rows = decoding.rows
        texts = [row.text() for row in rows] if self.tokenizer is not None else None
        return GenerationResult(texts, [r.tokens for r in rows], [r.finish for r in rows], decoding.timing)

    def stream(self, prompt: Any, **options: Any) -> Iterator[Any]:
        """Continues one prompt piece by piece: text if there is a tokenizer, else tokens. Options as in `generate`.

        Text comes in whole characters, and what may be the start of a stop text is held back until it is not.

        Raises:
            GenerationError: at once, if the request cannot be served.
        """
        decoding = self._start(prompt, Options.of(options), stream=True)
        if len(decoding.rows) != 1:
            raise GenerationError(
                f"There are {len(decoding.rows)} prompts, and only one can be streamed", fix="Use generate for several"
            )
        return self._pieces(decoding)

    def _pieces(self, decoding: "_Decoding") -> Iterator[Any]:
        (row,) = decoding.rows
        for _ in decoding:
            if self.tokenizer is None:
                yield row.tokens[-1]
            elif row.piece:
                yield row.piece

    def _start(self, prompts: Any, options: "Options", *, stream: bool) -> "_Decoding":
        _require_caches(self.contract, self.metadata)
        options.sampling.check()
        stop = [options.stop] if isinstance(options.stop, str) else list(options.stop)
        if stop and self.tokenizer is None:
            raise GenerationError("A stop text was given, and the program has no tokenizer", fix="Use eos_token_ids")
        if not all(stop):
            raise GenerationError("A stop text is empty", fix="Leave it out")
        rows = read_prompts(prompts, self.tokenizer, chat=options.chat, attention_mask=options.attention_mask)
        check_request(rows, options.max_new_tokens, self.contract, self.metadata)
        eos = frozenset(self.metadata.eos_token_ids if options.eos_token_ids is None else options.eos_token_ids)
        incremental = self.tokenizer is not None and (stream or bool(stop))
        outcomes = [Row(options.max_new_tokens, eos, self.tokenizer, stop if incremental else None) for _ in rows]
        # A tree has more guesses than can hold, and each lies in a slot of its own.
        spare = options.draft_tokens if isinstance(options.draft, MedusaHeads) else 0
        steps = _Steps(self.run, self.contract, rows, options.max_new_tokens, spare)
        parts = steps, rows, outcomes
        if options.draft is None:
            if isinstance(self.run, SamplingExecutable):
                # Only the tokens travel. Guesses are checked against whole distributions, which must.
                steps.stay(self.run)
            return _Decoding(*parts, options)
        if isinstance(options.draft, MedusaHeads):
            self._check_heads(rows, options)
            return _Guessing(*parts, options)
        generator = options.sampling.generator()
        return _Speculating(*parts, options, self._drafter(rows, options, generator), generator)

    def _check_heads(self, rows: list[list[int]], options: "Options") -> None:
        """Refuses what a tree of guesses cannot serve.

        Raises:
            GenerationError: the program takes no tree or has other hidden states, or tokens are to be drawn.
        """
        _require_one(rows, options, self.contract)
        if self.contract.input("tree_mask") is None or "hidden" not in self.contract.outputs:
            raise GenerationError(
                "Medusa heads need a program that verifies trees of guesses",
                fix="Compile it with a recipe that has tree_verification",
            )
        if options.temperature or options.repetition_penalty != 1.0:
            raise GenerationError(
                "A tree of guesses is checked against the one most likely token, and tokens are to be chosen otherwise",
                fix="Leave out temperature and repetition_penalty, or the draft",
            )

    def _drafter(self, rows: list[list[int]], options: "Options", generator: torch.Generator) -> Drafter:
        """Whoever guesses for this request.

        Raises:
            GenerationError: the request or the draft does not allow it.
        """
        _require_one(rows, options, self.contract)
        if isinstance(options.draft, str):
            if options.draft != PROMPT_LOOKUP:
                raise GenerationError(
                    f"There is no draft {options.draft!r}", fix=f"Use {PROMPT_LOOKUP!r}, or a compiled program"
                )
            return PromptLookup()
        draft = getattr(options.draft, "generator", options.draft)
        if not isinstance(draft, Generator):
            raise GenerationError(
                f"A draft is {PROMPT_LOOKUP!r} or a compiled program, and this is a {type(options.draft).__name__}"
            )
        if draft.metadata.vocab_size != self.metadata.vocab_size:
            raise GenerationError(
                f"The draft has a vocabulary of {draft.metadata.vocab_size} tokens, and the program one of "
                f"{self.metadata.vocab_size}",
                fix="Use a draft with the same tokenizer, such as a cheaper recipe of the same model",
            )
        _require_caches(draft.contract, draft.metadata)
        _require_whole_caches(draft.contract, "The draft")
        check_request(rows, options.max_new_tokens, draft.contract, draft.metadata)
        steps = _Steps(draft.run, draft.contract, rows, options.max_new_tokens)
        return ModelDrafter(steps.extend, options.sampling, generator)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of a generation besides its prompts; see `Sampling` for how tokens are chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    eos_token_ids: Sequence[int] | None = None
    chat: bool = False
    attention_mask: Tensor | None = None
    draft: Any = None
    draft_tokens: int = 5

    @staticmethod
    def of(given: Mapping[str, Any]) -> "Options":
        """Options from keyword arguments.

        Raises:
            GenerationError: one of them is unknown.
        """
        known = {entry.name for entry in fields(Options)}
        for name in given:
            if name not in known:
                raise GenerationError(f"There is no option {name}", fix=nearest(name, known))
        return Options(**given)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)


def _require_caches(contract: Contract, metadata: Metadata) -> None:
    if not metadata.causal:
        raise GenerationError(
            f"{metadata.name} is not a causal language model, so it cannot continue a prompt",
            fix="Call the program with its inputs instead",
        )
    if not contract.state or any(contract.input(role) is None for role in ("token", "position")):
        raise GenerationError(
            f"{metadata.name} was compiled without caches, so every new token would recompute the whole text",
            fix="Compile it with a recipe that has static_cache, such as fp32 or int8",
        )
    unknown = [spec.name for spec in contract.inputs if spec.role not in STEP_ROLES]
    if unknown:
        raise GenerationError(
            f"The program takes {', '.join(unknown)}, which tokens alone do not determine",
            fix="Call the program with all its inputs by name",
        )


def _require_one(rows: list[list[int]], options: Options, contract: Contract) -> None:
    if options.draft_tokens < 1:
        raise GenerationError(f"draft_tokens is {options.draft_tokens}", fix="It must be 1 or more")
    if len(rows) != 1:
        raise GenerationError(
            f"There are {len(rows)} prompts, and guesses are checked for one at a time",
            fix="Call generate once for each prompt, or without a draft",
        )
    _require_whole_caches(contract, "The program")


def _require_whole_caches(contract: Contract, whose: str) -> None:
    rings = [spec.name for spec in contract.state if not {"capacity", "blocks"}.intersection(spec.shape)]
    if rings:
        raise GenerationError(
            f"{whose} keeps {rings[0]} as a ring of the last tokens, and guesses that fall would have pushed out some "
            "that are needed",
            fix="Generate without a draft, or without sliding windows and caches of a fixed size",
        )


class _Steps:
    """The inputs of one batch, step after step, and the caches they are about.

    Everything that a step needs is allocated once; a step changes it in place.
    """

    def __init__(self, run: Run, contract: Contract, prompts: list[list[int]], new_tokens: int, spare: int = 0) -> None:
        self._run = run
        self.sample: Sampler = sample_tokens.reference
        """Chooses tokens from the logits of a step, where they lie."""
        names = {spec.role: spec.name for spec in contract.inputs}
        self._token, self._position = names["token"], names["position"]
        self._keys, self._index = names.get("key_position"), names.get("logit_index")
        self._slots, self._mask = names.get("slot"), names.get("tree_mask")
        self._caches = [
            (spec.name, spec.shape.index("capacity")) for spec in contract.state if "capacity" in spec.shape
        ]
        self.hidden = torch.zeros(0)
        """What the head read for the last token [1, d], where the program shows it."""
        rows = contract.input("token")
        chunk = rows.shape[1] if rows else "sequence"
        self._chunk = chunk if isinstance(chunk, int) else contract.dim(chunk).max
        self._lengths = [len(prompt) for prompt in prompts]
        needed = max(self._lengths) + new_tokens + spare
        # The last slot of a cache is scratch. Caches lie where the program runs; tokens and logits travel.
        device = getattr(run, "device", "cpu")
        sizes = {"batch": len(prompts), "capacity": needed + 1, **pool_sizes(contract, len(prompts), needed)}
        self._tensors = contract.allocate(sizes, device)
        table = contract.input("block_table")
        if table is not None:
            self._tensors[table.name] = block_tables(table, len(prompts), needed)
        self._steps = torch.arange(needed)
        self._live = max(self._lengths)
        self._advance = torch.ones(len(prompts), 1, dtype=torch.int64)

    def stay(self, run: SamplingExecutable) -> None:
        """Leaves logits where they are made; `sample` chooses there."""
        self._run, self.sample = run.resident, run.sample

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Runs over all prompts at once; the logits [B, V] after each one's last token."""
        tokens = torch.zeros(len(prompts), self._live, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        last = torch.tensor(self._lengths)[:, None] - 1
        # A text may be longer than what a program takes at once, if its caches forget.
        starts = range(0, self._live, self._chunk)
        parts = [self._prefill_chunk(tokens, start, min(start + self._chunk, self._live), last) for start in starts]
        self._prepare_steps(last)
        rows = torch.arange(len(prompts))
        logits, *others = (torch.stack(part)[last[:, 0] // self._chunk, rows] for part in zip(*parts, strict=True))
        if others:
            self.hidden = others[0]
        return logits

    def _prefill_chunk(self, tokens: Tensor, start: int, end: int, last: Tensor) -> list[Tensor]:
        """Runs over columns start … end - 1; each output [B, …] for rows that end there, and any for the others."""
        steps = self._steps[start:end]
        place = (last - start).clamp(0, end - start - 1)
        chunk = {self._token: tokens[:, start:end], self._position: torch.where(steps <= last, steps, -1)}
        if self._keys:
            chunk[self._keys] = self._steps[:end]
        if self._index:
            chunk[self._index] = place
        outputs = self._run({**self._tensors, **self._without_guesses(chunk)})[:2]
        chosen = torch.zeros_like(place[:, 0]) if self._index else place[:, 0]
        return [output[torch.arange(len(tokens)), chosen] for output in outputs]

    def _without_guesses(self, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with those that a program for trees of guesses takes besides."""
        if self._slots and self._mask and self._keys:
            chunk[self._slots] = chunk[self._position]
            chunk[self._mask] = torch.zeros(chunk[self._position].shape[1], len(chunk[str(self._keys)]))
        return chunk

    def _prepare_steps(self, last: Tensor) -> None:
        self._tensors[self._token] = torch.zeros_like(last)
        self._tensors[self._position] = last.clone()
        if self._index:
            self._tensors[self._index] = torch.zeros_like(last)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Runs over one new token [B] of every prompt; the logits [B, V] after it."""
        tensors = self._tensors
        self._live += 1
        tensors[self._token].copy_(tokens[:, None])
        tensors[self._position].add_(self._advance)
        if self._keys:
            tensors[self._keys] = self._steps[: self._live]
        return self._run(self._without_guesses(tensors))[0][:, -1]

    @torch.no_grad()
    def extend(self, start: int, tokens: list[int]) -> Tensor:
        """Runs over tokens of the only prompt from place `start` on; the logits [S, V] after each.

        What the caches held from there on is written over, and never seen.
        """
        end = start + len(tokens)
        chunk = {self._token: torch.tensor([tokens]), self._position: self._steps[start:end][None]}
        if self._keys:
            chunk[self._keys] = self._steps[:end]
        if self._index:
            chunk[self._index] = self._steps[None, : len(tokens)]
        return self._run({**self._tensors, **self._without_guesses(chunk)})[0][0]

    @torch.no_grad()
    def verify(self, start: int, tree: Tree) -> tuple[Tensor, Tensor]:
        """Runs over a tree of guesses whose node 0 has the place `start`; logits [n, V] and hidden states [n, d]."""
        places = start + tree.depths
        slots = start + torch.arange(len(tree))
        chunk = {
            self._token: torch.tensor([tree.tokens]),
            self._position: places[None],
            str(self._keys): torch.cat([self._steps[:start], places]),
            str(self._slots): slots[None],
            str(self._mask): tree.mask(start),
        }
        if self._index:
            chunk[self._index] = torch.arange(len(tree))[None]
        logits, hidden = self._run({**self._tensors, **chunk})[:2]
        return logits[0], hidden[0]

    def keep(self, start: int, path: list[int]) -> None:
        """Puts what the caches hold of the nodes of a path where tokens that are certain lie."""
        old = start + torch.tensor(path)
        for name, axis in self._caches:
            cache = self._tensors[name]
            cache.narrow(axis, start, len(path)).copy_(cache.index_select(axis, old.to(cache.device)))

    def end(self, row: int) -> None:
        """From now on the tokens of this row count as padding."""
        self._tensors[self._position][row] = -1
        self._advance[row] = 0


class _Decoding:
    """A generation under way; each iteration adds one token to every row that has not ended."""

    def __init__(self, steps: _Steps, prompts: list[list[int]], rows: list[Row], options: Options) -> None:
        self.rows = rows
        self.timing = Timing(prompt_tokens=sum(map(len, prompts)))
        self._steps = steps
        self._prompts = prompts
        self._sampling = options.sampling

    def __iter__(self) -> Iterator[None]:
        """Prefill, then steps until every row has ended.

        Time is taken around the program and the choice of tokens, not while a reader of the stream works.
        """
        generator = self._sampling.generator()
        started = time.perf_counter()
        logits = self._steps.prefill(self._prompts)
        seen = None
        if self._sampling.repetition_penalty != 1.0:
            seen = seen_tokens(self._prompts, logits).to(logits.device)
        tokens = choose(logits, self._sampling, generator, seen, self._steps.sample)
        self.timing.prefill_seconds = time.perf_counter() - started
        active = self._take(tokens, list(range(len(self.rows))))
        yield
        while active:
            started = time.perf_counter()
            if seen is not None:
                seen.scatter_(1, tokens[:, None].to(seen.device), True)
            tokens = choose(self._steps.step(tokens), self._sampling, generator, seen, self._steps.sample)
            active = self._take(tokens, active)
            self.timing.decode_seconds += time.perf_counter() - started
            decoded = self.timing.new_tokens - len(self.rows)
            self.timing.tokens_per_second = decoded / self.timing.decode_seconds
            yield

    def _take(self, tokens: Tensor, active: list[int]) -> list[int]:
        """Gives every active row its token; returns the rows that go on."""
        values = tokens.tolist()
        self.timing.new_tokens += len(active)
        ended = [index for index in active if self.rows[index].push(values[index])]
        for index in ended:
            self._steps.end(index)
        return [index for index in active if index not in ended] if ended else active


class _Speculating(_Decoding):
    """A generation in which a drafter guesses; each iteration still adds one token."""

    def __init__(
        self,
        steps: _Steps,
        prompts: list[list[int]],
        rows: list[Row],
        options: Options,
        drafter: Drafter,
        generator: torch.Generator,
    ) -> None:
        super().__init__(steps, prompts, rows, options)
        self._drafter = drafter
        self._options = options
        self._generator = generator

    def __iter__(self) -> Iterator[None]:
        """Prefill, then guesses and their check until the row has ended."""
        ((row,), (prompt,), sampling) = self.rows, self._prompts, self._sampling
        started = time.perf_counter()
        first = draw(distribution(self._steps.prefill(self._prompts), sampling, prompt), self._generator)
        self.timing.prefill_seconds = time.perf_counter() - started
        active, text = self._take(first, [0]), [*prompt, int(first)]
        yield
        while active:
            started = time.perf_counter()
            tokens = self._next(text, self._options.max_new_tokens - len(row.tokens))
            self.timing.decode_seconds += time.perf_counter() - started
            for token in tokens:
                active = self._take(torch.tensor([token]), active)
                self.timing.tokens_per_second = (self.timing.new_tokens - 1) / self.timing.decode_seconds
                yield
                if not active:
                    return
            text += tokens

    def _next(self, text: list[int], room: int) -> list[int]:
        """One token or more, of which the last is no guess; at most `room`."""
        draft = self._drafter.propose(text, min(self._options.draft_tokens, room - 1))
        logits = self._steps.extend(len(text) - 1, [text[-1], *draft.tokens])

        def target(kept: list[int]) -> Tensor:
            return distribution(logits[len(kept) : len(kept) + 1], self._sampling, text + kept)

        tokens = accept(draft, target, self._generator)
        self.timing.drafted_tokens += len(draft.tokens)
        self.timing.accepted_tokens += len(tokens) - 1
        return tokens


class _Guessing(_Decoding):
    """A generation in which further heads guess a tree of tokens behind each one; each iteration still adds one."""

    def __init__(self, steps: _Steps, prompts: list[list[int]], rows: list[Row], options: Options) -> None:
        super().__init__(steps, prompts, rows, options)
        self._heads: MedusaHeads = options.draft
        self._options = options

    def __iter__(self) -> Iterator[None]:
        """Prefill, then trees until the row has ended."""
        ((row,), (prompt,)) = self.rows, self._prompts
        started = time.perf_counter()
        first = self._steps.prefill(self._prompts).argmax(-1)
        hidden, text = self._steps.hidden, [*prompt, int(first)]
        self.timing.prefill_seconds = time.perf_counter() - started
        active = self._take(first, [0])
        yield
        while active:
            started = time.perf_counter()
            tokens, hidden = self._next(text, hidden, self._options.max_new_tokens - len(row.tokens))
            self.timing.decode_seconds += time.perf_counter() - started
            for token in tokens:
                active = self._take(torch.tensor([token]), active)
                self.timing.tokens_per_second = (self.timing.new_tokens - 1) / self.timing.decode_seconds
                yield
                if not active:
                    return
            text += tokens

    def _next(self, text: list[int], hidden: Tensor, room: int) -> tuple[list[int], Tensor]:
        """At most `room` tokens, and what the head read for the last but one of them, whose guess they are behind."""
        start = len(text) - 1
        guesses = self._heads(hidden)[: room - 1, 0].log_softmax(-1)
        tree = likely_tree(text[-1], guesses, self._options.draft_tokens if room > 1 else 0)
        logits, states = self._steps.verify(start, tree)
        path, following = best_path(tree, logits.argmax(-1).tolist())
        self._steps.keep(start, path)
        self.timing.drafted_tokens += len(tree) - 1
        self.timing.accepted_tokens += len(path) - 1
        return [*(tree.tokens[node] for node in path[1:]), following], states[path[-1]][None]


__all__ = ["GenerationResult", "Generator", "Options", "Run", "Timing"]
