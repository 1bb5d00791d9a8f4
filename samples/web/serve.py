"""A page that runs an exported model in the browser: text box, streamed answer, tokens per second.

    graphwright export MODEL --format onnx --recipe int4 -o DIR
    npm ci --prefix samples/web
    python samples/web/serve.py DIR                # then open what it prints

Nothing is computed here: the files are handed out, and onnxruntime-web runs the model in the browser.
"""

import argparse
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "node_modules"
NEEDED = ("model.onnx", "genai_config.json", "tokenizer.json")


class Handler(SimpleHTTPRequestHandler):
    """Hands out the page, the packages that it imports, and the model."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *arguments, model: Path, **named):
        self.folders = {
            "model": model,
            "ort": PACKAGES / "onnxruntime-web" / "dist",
            "tokenizers": PACKAGES / "@huggingface" / "tokenizers" / "dist",
            "": HERE / "page",
        }
        super().__init__(*arguments, **named)

    def translate_path(self, path: str) -> str:
        """The file of an address; one that climbs out of its folder has none."""
        parts = [part for part in PurePosixPath(unquote(urlsplit(path).path)).parts if part != "/"]
        if ".." in parts:
            return ""
        first = parts[0] if parts and parts[0] in self.folders else ""
        folder = self.folders[first]
        rest = parts[1:] if first else parts
        return str(folder.joinpath(*rest) if rest else folder / "index.html")

    def end_headers(self) -> None:
        """Threads of WebAssembly share memory, which browsers grant to isolated pages only."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_arguments) -> None:
        """Says nothing of every file."""


def server(model: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of `model` on this machine alone.

    Raises:
        FileNotFoundError: the model's folder or the packages are not complete; says what to do.
    """
    missing = [name for name in NEEDED if not (model / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{model} holds no {', '.join(missing)}: export a language model with its tokenizer, --format onnx"
        )
    if not (PACKAGES / "onnxruntime-web").is_dir():
        raise FileNotFoundError(f"The page's packages are not installed: npm ci --prefix {HERE}")
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, model=model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    try:
        serving = server(arguments.model, arguments.port)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"http://127.0.0.1:{serving.server_address[1]}/", flush=True)
    serving.serve_forever()


if __name__ == "__main__":
    main()
