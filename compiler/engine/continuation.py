"""One prompt's continuation: its tokens, its text as it grows, and why it ends."""

from graphwright.engine.tokenizer import Tokenizer, TokenStream


class Row:
    """One prompt's continuation as it grows."""

    def __init__(
        self, limit: int, eos: frozenset[int], tokenizer: Tokenizer | None, stop: list[str] | None = None
    ) -> None:
        """With `stop` (even an empty list) text is made token by token, else at the end."""
        self.tokens: list[int] = []
        self.finish = ""
        self.piece = ""
        """The text that the last token added."""
        self._limit = limit
        self._eos = eos
        self._tokenizer = tokenizer
        self._shown: list[str] = []
        self._text = _Text(tokenizer.stream(), stop) if tokenizer is not None and stop is not None else None

    def push(self, token: int) -> bool:
        """Adds a token; whether the row has ended with it."""
        self.tokens.append(token)
        if token in self._eos:
            self.finish = "eos"
        elif len(self.tokens) == self._limit:
            self.finish = "length"
        if self._text is not None:
            self.piece = "" if self.finish == "eos" else self._text.push(token)
            if self._text.stopped:
                self.finish = "stop"
            if self.finish:
                self.piece += self._text.flush()
                if self._text.stopped:
                    self.finish = "stop"
            self._shown.append(self.piece)
        return bool(self.finish)

    def text(self) -> str:
        """The whole continuation as text, without the end-of-sequence token."""
        if self._text is not None:
            return "".join(self._shown)
        tokens = self.tokens[:-1] if self.finish == "eos" else self.tokens
        return self._tokenizer.decode(tokens) if self._tokenizer is not None else ""


class _Text:
    """Text from tokens, up to a stop text: what may be its start is held back, across the borders of tokens."""

    def __init__(self, stream: TokenStream, stop: list[str]) -> None:
        self.stopped = False
        self._stream = stream
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be shown now."""
        return self._show(self._stream.push(token))

    def flush(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        shown = self._show(self._stream.flush())
        rest, self._held = self._held, ""
        return shown + rest

    def _show(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` starts with.

    >>> _overlap("a new EN", "END")
    2
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
