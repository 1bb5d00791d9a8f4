"""Tokens, templates and streams agree with `transformers`; streams never break a character."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import GenerationError, SourceError
from graphwright.sources import demo_model

TEXTS = [
    "Hello, world!",
    "  two  blanks\tand\n\nlines \n",
    "naïve café Ærøskøbing",
    "日本語と中文、한국어 text",
    "👩‍👩‍👧‍👦 family, 👋🏽 wave, 🇩🇰 flag",
    "عربى עברית",
    "def f(x):\n    return x ** 2  # 3.14e-5",
    "<|im_start|>user\nnot escaped<|im_end|>",
    "",
    "\u0301combining \u200b zero width \ufffd",
]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[str]]:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    return "".join(pieces) + stream.flush(), pieces


def byte_level(folder: Path) -> Tokenizer:
    """One token for every byte, which splits every character that is not ASCII; token 256 is special."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Fast(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    fast.enable_truncation(3)
    fast.enable_padding(length=8)
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def metaspace(folder: Path) -> Tokenizer:
    """Llama's way: blanks are part of words, the first one is stripped, unknown characters are bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "b", "c", "!"]
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = Fast(models.BPE(vocabulary, [("▁", "b")], unk_token="<unk>", byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<s>"])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=["bytes", "metaspace"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made: Tokenizer = request.param(tmp_path_factory.mktemp("tokenizer"))
    return made


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and theirs, from SmolLM2's own file."""
    from transformers import AutoTokenizer

    file = demo_model()
    folder = tmp_path_factory.mktemp("smol")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs.save_pretrained(folder)
    return Tokenizer(folder), theirs


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_put_together_are_the_decoded_text(tiny: Tokenizer, data: st.DataObject) -> None:
    """Bytes that spell nothing are left out for byte fallback, whose decoder then takes back what it said before."""
    first = 258 if tiny.encode(" b") == tiny.encode("b") else 0  # only Metaspace takes the two for one
    tokens = st.integers(first, tiny.vocab_size - 1).map(lambda token: [token])
    letters = st.characters(min_codepoint=128, exclude_categories=("Cs",)).map(tiny.encode)
    ids = [token for part in data.draw(st.lists(tokens | letters, max_size=30)) for token in part]
    assert streamed(tiny, ids)[0] == tiny.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=("Cs",)), max_size=20))
def test_no_piece_breaks_a_character(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    whole, pieces = streamed(tiny, ids)
    assert whole == tiny.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_bytes_comes_whole(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    assert streamed(tokenizer, tokenizer.encode("a👋"))[1] == ["a", "", "", "", "👋"]


def test_saved_truncation_and_padding_do_not_apply(tmp_path: Path) -> None:
    assert len(byte_level(tmp_path).encode("a longer text")) == 13


def test_the_window_of_a_stream_stays_small(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    stream = tokenizer.stream()
    for token in tokenizer.encode("👋é" * 200):
        stream.push(token)
        assert len(stream._window) <= 10


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"),
        ("chat_template.json", {"chat_template": "{{ bos_token }}[{{ messages[0]['content'] }}]"}),
        ("tokenizer_config.json", {"chat_template": "{{ bos_token }}[{{ messages[0].content }}]", "bos_token": "<s>"}),
        (
            "tokenizer_config.json",
            {
                "bos_token": {"content": "<s>"},
                "chat_template": [
                    {"name": "tools", "template": "no"},
                    {"name": "default", "template": "{{ bos_token }}[{{ messages[0].content }}]"},
                ],
            },
        ),
    ],
)
def test_templates_are_found_wherever_they_lie(tmp_path: Path, file: str, content: Any) -> None:
    metaspace(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    assert Tokenizer(tmp_path).render([{"role": "user", "content": "hi"}]) == "<s>[hi]"


def test_templates_know_the_extras_of_transformers(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    tokenizer = _with_template(tmp_path, template)
    messages = [{"role": "x", "content": ""}, {"role": "user", "content": "<é>"}]
    assert tokenizer.render(messages) == '{"role": "user", "content": "<é>"}20'


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "damaged"),
    ],
)
def test_templates_that_fail_are_one_error(tmp_path: Path, template: str, problem: str) -> None:
    with pytest.raises(GenerationError, match=problem):
        _with_template(tmp_path, template).encode("hi", chat=True)


def test_chat_without_a_template_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="no chat template"):
        tiny.encode("hi", chat=True)
    with pytest.raises(GenerationError, match="chat=True"):
        tiny.encode([{"role": "user", "content": "hi"}])


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(SourceError, match="damaged"):
        Tokenizer(tmp_path)
    metaspace(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer(tmp_path)


def _with_template(folder: Path, template: str) -> Tokenizer:
    metaspace(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.real_model
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_encodes_and_decodes_like_transformers(smol: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = smol
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
    assert streamed(ours, ids)[0] == ours.decode(ids)


@pytest.mark.real_model
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_chats_like_transformers(smol: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = smol
    chat = [{"role": "user", "content": text}]
    longer = [{"role": "system", "content": "Be brief."}, *chat, {"role": "assistant", "content": "Yes."}, *chat]
    for messages in (chat, longer):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(messages, add_generation_prompt=prompt) == expected
    tokens = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.encode(text, chat=True) == tokens
    assert ours.encode(chat, chat=True) == tokens


@pytest.mark.real_model
def test_smollm2_streams_any_tokens(smol: tuple[Tokenizer, Any]) -> None:
    import random

    ours, _ = smol
    chooser = random.Random(0)
    for _ in range(50):
        ids = [chooser.randrange(ours.vocab_size) for _ in range(60)]
        assert streamed(ours, ids)[0] == ours.decode(ids)
