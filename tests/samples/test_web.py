"""The page of samples/web in headless Chromium: the exported model's own tokens, streamed, on onnxruntime-web."""

import importlib.util
import itertools
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from families.configs import build
from samples.browser import DIRECT, Browser, chromium
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

import graphwright
from graphwright.accuracy import built_in_text
from graphwright.backends.onnx.runtime import Session
from graphwright.engine.tokenizer import Tokenizer

WEB = Path(__file__).parents[2] / "samples" / "web"
VOCABULARY = 384
TEXT = "Zwölf compilers, 3 of 42 — naïve?\n"
INT4 = {"passes": ["merge_linear", "static_cache", "select_logits", {"rtn": {"bits": 4, "group_size": 32}}]}

MISSING = [
    what
    for what, there in (
        ("chromium and chromium-driver (apt-get install chromium chromium-driver)", chromium()),
        ("the page's packages (npm ci --prefix samples/web)", (WEB / "node_modules" / "onnxruntime-web").is_dir()),
    )
    if not there
]


@pytest.fixture(scope="module", autouse=True)
def _complete() -> None:
    require_browser()


def require_browser() -> None:
    """A machine without a browser skips these tests; where everything is installed on purpose, that is a failure."""
    if MISSING and os.environ.get("CI"):
        pytest.fail(f"missing: {', '.join(MISSING)}")
    if MISSING:
        pytest.skip(f"missing: {', '.join(MISSING)}")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of SmolLM2's kind: single digits, merges, an end token."""
    fast = Fast(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    fast.pre_tokenizer = pre_tokenizers.Sequence(split)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[AddedToken("<|end|>", special=True)]
    )
    fast.train_from_iterator([built_in_text(held_out=True)[:20000]], trainer)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    build("llama", vocab_size=VOCABULARY).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    return graphwright.export(folder / "model", "onnx", folder / "out", recipe=INT4)


def sample() -> Any:
    """The module samples/web/serve.py."""
    spec = importlib.util.spec_from_file_location("serve", WEB / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    return serve


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of the page over an exported model."""
    with sample().server(model) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}/"
        serving.shutdown()


@contextmanager
def opened(address: str, profile: Path) -> Iterator[Browser]:
    """A browser at the page, when the model is loaded."""
    with Browser(profile) as browser:
        browser.open(address + "?threads=1")
        state = browser.until("const s = document.body.dataset.state; return s != 'loading' && s")
        said = browser.run("return document.getElementById('status').textContent")
        assert state == "ready", (said, browser.console())
        yield browser


@pytest.fixture(scope="module")
def address(exported: Path) -> Iterator[str]:
    with served(exported) as found:
        yield found


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory) -> Iterator[Browser]:
    with opened(address, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


WATCH = """
window.seen = [];
new MutationObserver(() => window.seen.push(document.getElementById('output').textContent))
  .observe(document.getElementById('output'), { childList: true, characterData: true, subtree: true });
"""

ASK = """
document.getElementById('prompt').value = arguments[0];
document.getElementById('count').value = arguments[1];
document.getElementById('generate').click();
return document.body.dataset.state;
"""


def test_the_tokens_are_those_of_onnx_runtime_and_they_are_streamed(page: Browser, exported: Path) -> None:
    tokenizer = Tokenizer(exported)
    expected, _ = Session(exported, threads=1).greedy(tokenizer.encode(TEXT), 24)
    page.run(WATCH)
    assert page.run(ASK, TEXT, 24) == "running"
    page.until("return document.body.dataset.state != 'running'")
    assert json.loads(page.run("return document.body.dataset.tokens")) == expected
    shown = page.run("return document.getElementById('output').textContent")
    assert tokenizer.decode(expected).startswith(shown)
    assert len(shown) > 10
    seen = page.run("return window.seen")
    assert len(set(seen)) > 5, "the text came at once, not piece by piece"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen) if later)
    assert page.run("return document.getElementById('speed').textContent").endswith(" tokens/s")


def test_it_stops_when_told_to(page: Browser) -> None:
    page.run(ASK, "Stop", 400)
    page.until("return document.getElementById('output').textContent.length > 3")
    page.run("document.getElementById('stop').click()")
    page.until("return document.body.dataset.state == 'ready'")
    assert 0 < len(json.loads(page.run("return document.body.dataset.tokens"))) < 400


def test_the_pages_tokenizer_is_the_models(page: Browser, exported: Path) -> None:
    script = """
      const [text, done] = [arguments[0], arguments[arguments.length - 1]];
      const { Tokenizer } = await import('/tokenizers/tokenizers.mjs');
      const read = async (name) => (await fetch('/model/' + name)).json();
      const made = new Tokenizer(await read('tokenizer.json'), await read('tokenizer_config.json'));
      return made.encode(text).ids;
    """
    for text in (TEXT, "  spaces\tand\r\nlines ", "数学 12345 <|end|> x"):
        assert page.run(f"return (async function() {{{script}}}).apply(null, arguments)", text) == list(
            Tokenizer(exported).encode(text)
        )


def test_the_server_hands_out_nothing_else(address: str) -> None:
    for path in ("model/../../model/config.json", "%2e%2e/serve.py", "model/%2e%2e/model/config.json", "serve.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            DIRECT.open(address + path)
    with DIRECT.open(address + "model/genai_config.json") as found:
        assert json.load(found)["model"]["type"] == "llama"


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.onnx.*--format onnx"):
        sample().server(tmp_path)
