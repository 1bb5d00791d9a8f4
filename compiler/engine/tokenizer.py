"""Text to tokens and back, from the files beside a model, without `transformers`.

tokenizer = Tokenizer(directory)
ids = tokenizer.encode("Why is the sky blue?", chat=True)
print(tokenizer.decode(ids))
stream = tokenizer.stream()
for token in new_tokens:
    print(stream.push(token), end="")
print(stream.flush())
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graphwright.errors import GenerationError, SourceError

Message = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`."""

INCOMPLETE = "\ufffd"
"""What a decoder shows for bytes that are no character, or not one yet."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A `tokenizer.json` and the chat template beside it."""

    def __init__(self, directory: Path | str) -> None:
        """Reads `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` where they exist.

        Raises:
            SourceError: there is no tokenizer, or it cannot be read.
        """
        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise SourceError(
                "There is no tokenizer.json",
                where=str(self.directory),
                fix="Write one with AutoTokenizer.from_pretrained(model).save_pretrained(directory)",
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # tokenizers raises plain Exception for every damage.
        except Exception as error:
            raise SourceError(f"The tokenizer is damaged: {error}", where=str(file), fix="Copy it again") from error
        # Saved settings of a training run; a prompt is neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = _read_json(self.directory / "tokenizer_config.json")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str | Sequence[Message], *, chat: bool = False) -> list[int]:
        """Tokens of a text with the model's own special tokens, or of a conversation that awaits its answer.

        Args:
            text: the text; with `chat` a user's message, or all messages so far.
            chat: put the text in the model's chat template.

        Raises:
            GenerationError: the model has no chat template, or the template refuses the messages.
        """
        if chat:
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
            # The template writes the special tokens itself.
            return list(self._tokenizer.encode(self.render(messages), add_special_tokens=False).ids)
        if not isinstance(text, str):
            raise GenerationError("A list of messages was given as text", fix="Pass chat=True, or a string")
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the model's chat template.

        Raises:
            GenerationError: there is no template, or it refuses the messages.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        # A template is a program of the model's author and may fail in any way.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise GenerationError(
                f"The model's chat template refuses these messages: {error}",
                where=str(self.directory),
                fix="Give every message a role and a content that the model knows, or pass plain text",
            ) from error

    def stream(self) -> "TokenStream":
        """A decoder for tokens that come one by one."""
        return TokenStream(self)

    @cached_property
    def _template(self) -> jinja2.Template:
        source = self._template_source()
        if source is None:
            raise GenerationError(
                "The model has no chat template", where=str(self.directory), fix="Give plain text, without chat"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise GenerationError(
                f"The model's chat template is damaged: {error}", where=str(self.directory), fix="Give plain text"
            ) from error

    def _template_source(self) -> str | None:
        """The template: a file of its own in newer models, else in a JSON; the default one if there are several."""
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = _read_json(self.directory / "chat_template.json").get("chat_template")
        found = found or self._settings.get("chat_template")
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            found = named.get("default") or next(iter(named.values()), None)
        return found or None

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        known = {**_read_json(self.directory / "special_tokens_map.json"), **self._settings}
        values = {name: known[name] for name in SPECIAL_TOKENS if known.get(name)}
        return {name: v["content"] if isinstance(v, dict) else str(v) for name, v in values.items()}


class TokenStream:
    """Decodes tokens as they come; the pieces put together are what `decode` says of all tokens.

    What a token spells may depend on its neighbours: a character of several bytes is spread over tokens, and a
    leading blank disappears at the start of a text. So the tokens of the last piece are kept for context, decoded
    with and without the new one, and the difference is the next piece; it is held back while it ends within a
    character. Only where tokens spell no text at all may the two differ: some decoders then take back whole characters
    before the wrong byte, which have been shown already.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0
        """How many tokens of the window have been shown; what follows is held back."""
        self._shown = ""
        """The text of those."""

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if len(text) <= len(self._shown) or text.endswith(INCOMPLETE):
            return ""
        piece = text[len(self._shown) :]
        recent = self._tokenizer.decode(self._window[self._context :])
        if recent:
            # All before the piece ended with a whole character, so the piece's own tokens are context enough.
            self._window, text = self._window[self._context :], recent
        self._context, self._shown = len(self._window), text
        return piece

    def flush(self) -> str:
        """The text still held back, when no more tokens come."""
        piece = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._window, self._context, self._shown = [], 0, ""
        return piece


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is just text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{file.name} is damaged: {error}", where=str(file), fix="Copy it again") from error
    return data if isinstance(data, dict) else {}
