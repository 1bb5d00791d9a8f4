"""The engine over hand-written programs: batches, padding, ends, sampling, streams and refusals."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from graphwright.contract import Contract, Dim, InputSpec, StateSpec
from graphwright.engine.continuation import _overlap
from graphwright.engine.generate import Generator
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import GenerationError
from graphwright.ops import sample_tokens
from graphwright.program import Metadata

VOCABULARY, WIDTH, CONTEXT, RING = 61, 8, 40, 1
METADATA = Metadata("tiny", "llama", causal=True, vocab_size=VOCABULARY, context_length=CONTEXT)
PROMPTS = [[5, 9, 3, 17, 2, 40, 8], [7], [11, 12, 13]]


def contract(*, chosen: bool = True, batch: int = 8) -> Contract:
    inputs = [
        InputSpec("input_ids", torch.int64, ("batch", "sequence"), "token", VOCABULARY),
        InputSpec("positions", torch.int64, ("batch", "sequence"), "position", CONTEXT),
        InputSpec("key_positions", torch.int64, ("keys",), "key_position", CONTEXT),
    ]
    if chosen:
        inputs.append(InputSpec("logit_index", torch.int64, ("batch", "logits"), "logit_index"))
    names = [("batch", batch), ("sequence", CONTEXT), ("keys", CONTEXT), ("capacity", CONTEXT + 1), ("logits", CONTEXT)]
    return Contract(
        tuple(inputs),
        ("logits",),
        tuple(Dim(name, 2 if name == "capacity" else 1, high) for name, high in names),
        (StateSpec("cache", torch.float64, ("batch", RING, "capacity", WIDTH)),),
    )


class Attention:
    """One layer of attention over a cache; `run` checks the contract and everything it is fed."""

    def __init__(self, contract: Contract) -> None:
        generator = torch.Generator().manual_seed(3)
        self.contract = contract
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
        self.places = torch.randn(CONTEXT, WIDTH, generator=generator, dtype=torch.float64)
        self.calls: list[dict[str, Tensor]] = []

    def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        self.contract.check(tensors)
        cache, positions, keys = tensors["cache"], tensors["positions"], tensors["key_positions"]
        self.calls.append({name: t.clone() for name, t in tensors.items() if name != "cache"})
        assert keys.tolist() == list(range(len(keys)))
        assert positions.max() < len(keys) < cache.shape[2]
        hidden = self.embedding[tensors["input_ids"]] + self.places[positions.clamp(0)]
        slots = torch.where(positions < 0, cache.shape[2] - 1, positions)
        cache[:, 0].scatter_(1, slots[..., None].expand_as(hidden), hidden)
        cache[:, 0, -1] = float("nan")  # scratch: whoever reads it shows it
        held = cache[:, 0, : len(keys)]
        scores = (hidden @ held.mT).masked_fill(keys[None, None] > positions[..., None], -1e9)
        logits = (hidden + scores.softmax(-1) @ held).relu() @ self.embedding.T
        if "logit_index" in tensors:
            index = tensors["logit_index"][..., None].expand(-1, -1, VOCABULARY)
            logits = logits.gather(1, index)
        return (logits,)

    def expected(self, prompt: list[int], count: int) -> list[int]:
        """Greedy tokens by recomputing everything for every token."""
        ids = list(prompt)
        for _ in range(count):
            hidden = self.embedding[ids] + self.places[: len(ids)]
            mixed = hidden[-1] + (hidden @ hidden[-1]).softmax(-1) @ hidden
            ids.append(int((mixed.relu() @ self.embedding.T).argmax()))
        return ids[len(prompt) :]


class Script:
    """A program that says what it is told: `lines[row][step]` is the next token."""

    def __init__(self, lines: list[list[int]], vocabulary: int = 300) -> None:
        self.lines, self.step, self.vocabulary = lines, 0, vocabulary
        self.positions: list[list[int]] = []

    def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        self.positions.append(tensors["positions"][:, -1].tolist())
        logits = torch.zeros(len(self.lines), 1, self.vocabulary)
        for row, line in enumerate(self.lines):
            logits[row, 0, line[min(self.step, len(line) - 1)]] = 9.0
        self.step += 1
        return (logits,)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for every byte, some merges, and the special token <end>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in ("EN", "xx", "Dy"):
        vocabulary[pair] = len(vocabulary)
    fast = Fast(models.BPE(vocabulary, [(a, b) for a, b in ("EN", "xx", "Dy")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("[{{ messages[-1].content }}]")
    return Tokenizer(folder)


def speaking(tokenizer: Tokenizer | None, *lines: list[int], eos: tuple[int, ...] = ()) -> Generator:
    metadata = METADATA.with_(vocab_size=300, eos_token_ids=eos)
    return Generator(Script(list(lines)).run, contract(), metadata, tokenizer)


def tiny(chosen: bool = True, metadata: Metadata = METADATA) -> tuple[Attention, Generator]:
    model = Attention(contract(chosen=chosen))
    return model, Generator(model.run, model.contract, metadata)


@pytest.mark.parametrize("chosen", [True, False], ids=["logit_index", "all logits"])
def test_uneven_prompts_continue_as_if_alone(chosen: bool) -> None:
    model, engine = tiny(chosen)
    result = engine.generate(PROMPTS, max_new_tokens=9)
    assert result.tokens == [model.expected(prompt, 9) for prompt in PROMPTS]
    assert result.finish_reasons == ["length"] * 3
    assert result.texts is None
    assert [len(call["key_positions"]) for call in model.calls] == list(range(7, 7 + 9))
    assert model.calls[0]["positions"][1].tolist() == [0, *[-1] * 6]
    assert model.calls[1]["positions"][:, 0].tolist() == [7, 1, 3]


class Resident:
    """An executable that keeps logits to itself, and chooses tokens from them."""

    def __init__(self, model: Attention) -> None:
        self.resident, self.chosen = model.run, 0

    def __call__(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        raise AssertionError("logits are not to travel")

    def sample(self, logits: Tensor, uniform: Tensor, *options: Any) -> Tensor:
        assert uniform.shape == logits.shape[:1]
        self.chosen += 1
        return sample_tokens.reference(logits, uniform, *options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.3, "seed": 4}])
def test_tokens_are_chosen_where_logits_are_made(options: dict[str, Any]) -> None:
    model, engine = tiny()
    run = Resident(model)
    found = Generator(run, model.contract, METADATA).generate(PROMPTS, max_new_tokens=6, **options)
    assert found.tokens == engine.generate(PROMPTS, max_new_tokens=6, **options).tokens
    assert run.chosen == 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_padded_matrices(side: str, dtype: torch.dtype) -> None:
    model, engine = tiny()
    tokens, mask = torch.full((3, 7), 60), torch.zeros(3, 7, dtype=dtype)
    for row, prompt in enumerate(PROMPTS):
        place = slice(7 - len(prompt), 7) if side == "left" else slice(0, len(prompt))
        tokens[row, place], mask[row, place] = torch.tensor(prompt), True
    result = engine.generate(tokens, attention_mask=mask, max_new_tokens=5)
    assert result.tokens == [model.expected(prompt, 5) for prompt in PROMPTS]


def test_the_forms_of_token_prompts() -> None:
    model, engine = tiny()
    expected = [model.expected(PROMPTS[0], 3)]
    for prompt in (
        PROMPTS[0],
        [PROMPTS[0]],
        (tuple(PROMPTS[0]),),
        torch.tensor([PROMPTS[0]]),
        [torch.tensor(PROMPTS[0])],
    ):
        assert engine.generate(prompt, max_new_tokens=3).tokens == expected


def test_the_whole_context_can_be_used() -> None:
    model, engine = tiny()
    prompt = [n % VOCABULARY for n in range(CONTEXT - 4)]
    assert engine.generate([prompt], max_new_tokens=4).tokens == [model.expected(prompt, 4)]


def test_rows_that_ended_are_padding_and_the_rest_goes_on() -> None:
    script = Script([[4, 99, 7], [5, 5, 5, 99], [99]])
    engine = Generator(script.run, contract(), METADATA.with_(vocab_size=300, eos_token_ids=(99, 98)))
    result = engine.generate([[1], [1, 2], [1, 2, 3]], max_new_tokens=10)
    assert result.tokens == [[4, 99], [5, 5, 5, 99], [99]]
    assert result.finish_reasons == ["eos"] * 3
    assert script.positions[1:] == [[1, 2, -1], [-1, 3, -1], [-1, 4, -1]]
    assert (result.timing.prompt_tokens, result.timing.new_tokens) == (6, 7)


def test_eos_can_be_replaced_and_switched_off() -> None:
    for eos, length in ((None, 2), ((), 6), ((7,), 3)):
        engine = speaking(None, [4, 99, 7, 8], eos=(99,))
        assert len(engine.generate([[1]], max_new_tokens=6, eos_token_ids=eos).tokens[0]) == length


def test_texts(text: Tokenizer) -> None:
    (end,) = text.encode("<end>")
    engine = speaking(text, [*text.encode("blå 👋"), end], text.encode("second" * 9), eos=(end,))
    result = engine.generate(["one", "another"], max_new_tokens=20)
    assert result.texts == ["blå 👋", ("second" * 9)[:20]]
    assert result.finish_reasons == ["eos", "length"]


def test_chat_wraps_texts_and_takes_conversations(text: Tokenizer) -> None:
    seen = []

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        seen.append(text.decode(tensors["input_ids"][0].tolist()))
        return (torch.zeros(len(tensors["input_ids"]), 1, 300),)

    engine = Generator(run, contract(), METADATA.with_(vocab_size=300), text)
    message = {"role": "user", "content": "hi"}
    for prompts in ("hi", ["hi"], [message], [[message], [message]]):
        engine.generate(prompts, max_new_tokens=1, chat=True)
    assert seen == ["[hi]"] * 4


@pytest.mark.parametrize(
    ("spoken", "stop", "expected", "finish"),
    [
        ("abcENDyes", ["END"], "abc", "stop"),  # END lies across EN and Dy
        ("abcENDyes", "END", "abc", "stop"),
        ("abc", ["abc"], "", "stop"),
        ("xxxxy!", ["xxxy"], "x", "stop"),
        ("one two", ["two", "one two"], "", "stop"),
        ("ENDy", ["ENDy", "N"], "E", "stop"),
        ("nothing EN", ["END"], "nothing EN", "length"),  # held back, then shown
        ("a👋b", ["👋"], "a", "stop"),
    ],
)
def test_stop_texts(text: Tokenizer, spoken: str, stop: Any, expected: str, finish: str) -> None:
    ids = text.encode(spoken)
    result = speaking(text, ids).generate("?", max_new_tokens=len(ids), stop=stop)
    assert result.texts == [expected]
    assert result.finish_reasons == [finish]
    assert result.tokens[0] == ids[: len(result.tokens[0])]
    assert "".join(speaking(text, ids).stream("?", max_new_tokens=len(ids), stop=stop)) == expected


def test_overlap() -> None:
    assert [_overlap(t, "END") for t in ("", "E", "xEN", "END", "NE", "x")] == [0, 1, 2, 0, 1, 0]


def test_streams_come_in_whole_characters(text: Tokenizer) -> None:
    ids = text.encode("å 👋END")
    pieces = list(speaking(text, ids).stream("?", max_new_tokens=len(ids)))
    assert pieces == ["å", " ", "👋", "EN", "D"]


def test_streams_of_tokens_without_a_tokenizer_and_the_end_of_a_cut_character(text: Tokenizer) -> None:
    assert list(speaking(None, [4, 5, 6, 99], eos=(99,)).stream([1], max_new_tokens=9)) == [4, 5, 6, 99]
    cut = text.encode("a👋")[:3]
    assert "".join(speaking(text, cut).stream("?", max_new_tokens=3)) == text.decode(cut)


def test_seeds_reproduce_and_differ() -> None:
    def run(seed: int, **options: Any) -> list[list[int]]:
        return tiny()[1].generate(PROMPTS, max_new_tokens=12, temperature=2.0, seed=seed, **options).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1, top_k=1) == [tiny()[0].expected(prompt, 12) for prompt in PROMPTS]


def test_a_repetition_penalty_forbids_what_was_said_and_asked() -> None:
    _, engine = tiny()
    result = engine.generate(PROMPTS, max_new_tokens=20, repetition_penalty=1e9)
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
        assert len(set(prompt + tokens)) == len(prompt + tokens)


def test_timing_adds_up() -> None:
    def slow(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        time.sleep(0.01)
        return (torch.zeros(1, 1, 300),)

    timing = Generator(slow, contract(), METADATA).generate([[1, 2]], max_new_tokens=6).timing
    assert timing.prefill_seconds >= 0.01
    assert timing.decode_seconds >= 0.05
    assert timing.tokens_per_second == pytest.approx(5 / timing.decode_seconds)
    assert tiny()[1].generate([[1]], max_new_tokens=1).timing.tokens_per_second == 0.0


def test_a_step_costs_little_besides_the_program() -> None:
    metadata = METADATA.with_(context_length=4096, vocab_size=49152)
    logits = torch.zeros(1, 1, 49152)
    engine = Generator(lambda tensors: (logits,), contract(), metadata)
    best = min(engine.generate([[1]], max_new_tokens=300).timing.decode_seconds / 299 for _ in range(5))
    assert best < 400e-6  # 150 are promised; a shared machine is given some room


def test_the_cache_is_allocated_once_and_steps_reuse_their_inputs() -> None:
    seen: list[tuple[int, ...]] = []

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        seen.append(tuple(tensors[name].data_ptr() for name in ("cache", "input_ids", "positions", "key_positions")))
        assert not torch.is_grad_enabled()
        return (torch.zeros(1, 1, 300),)

    Generator(run, contract(), METADATA).generate([[1, 2]], max_new_tokens=5)
    assert len({call[0] for call in seen}) == 1
    assert len(set(seen[1:])) == 1
    assert torch.is_grad_enabled()


Change = Callable[[Contract], Contract]
REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    ("There is no prompt", [], {}),
    ("Prompt 1 is empty", [[1], []], {}),
    ("Prompt 0 is empty", torch.zeros(1, 0, dtype=torch.int64), {}),
    ("max_new_tokens is 0", [[1]], {"max_new_tokens": 0}),
    ("leaves no room", [[1] * CONTEXT], {}),
    ("at most 3 new tokens", [[1], [1] * 37], {"max_new_tokens": 4}),
    ("token 61, and the model knows 0 to 60", [[1, 61]], {}),
    ("token -1", [[-1]], {}),
    ("takes 1 to 8", [[1]] * 9, {}),
    ("no tokenizer", "text", {}),
    ("no tokenizer", ["text"], {}),
    ("no tokenizer", [[1]], {"stop": ["x"]}),
    ("temperature is -1", [[1]], {"temperature": -1.0}),
    ("top_p is 0", [[1]], {"top_p": 0.0}),
    ("top_p is 1.5", [[1]], {"top_p": 1.5}),
    ("Did you mean temperature", [[1]], {"temprature": 1.0}),
    (r"holds float 1\.5", [[1.5]], {}),
    ("holds str 'text'", [["text", 1]], {}),
    ("cannot be made of int", 7, {}),
    (r"float32\[1, 2\]", torch.zeros(1, 2), {}),
    (r"int64\[2\]", torch.zeros(2, dtype=torch.int64), {}),
    ("without a matrix", [[1]], {"attention_mask": torch.ones(1, 1)}),
    ("one mask value for every token", torch.ones(1, 2, dtype=torch.int64), {"attention_mask": torch.ones(1, 3)}),
]


@pytest.mark.parametrize(("problem", "prompts", "options"), REFUSED, ids=[r[0] for r in REFUSED])
def test_requests_that_cannot_be_served(problem: str, prompts: Any, options: dict[str, Any]) -> None:
    model, engine = tiny()
    with pytest.raises(GenerationError, match=problem):
        engine.generate(prompts, **{"max_new_tokens": 1, **options})
    with pytest.raises(GenerationError, match=problem):
        engine.stream(prompts, **{"max_new_tokens": 1, **options})  # at once, not at the first piece
    assert not model.calls


def test_an_empty_stop_text_and_an_empty_text(text: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="stop text is empty"):
        speaking(text, [1]).generate("x", stop=[""])
    with pytest.raises(GenerationError, match="Prompt 0 is empty"):
        speaking(text, [1]).generate("")


def test_only_one_prompt_is_streamed() -> None:
    with pytest.raises(GenerationError, match="only one can be streamed"):
        tiny()[1].stream(PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize(
    ("problem", "change", "causal"),
    [
        ("not a causal", lambda c: c, False),
        ("without caches", lambda c: c.with_(state=()), True),
        ("without caches", lambda c: c.with_(inputs=c.inputs[:1]), True),
        ("takes pixels", lambda c: c.with_(inputs=(*c.inputs, InputSpec("pixels", torch.float32, ("batch", 3)))), True),
    ],
)
def test_programs_that_cannot_generate(problem: str, change: Change, causal: bool) -> None:
    engine = Generator(lambda tensors: (), change(contract()), METADATA.with_(causal=causal))
    with pytest.raises(GenerationError, match=problem):
        engine.generate([[1]])
