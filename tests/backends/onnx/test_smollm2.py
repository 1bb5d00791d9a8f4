"""SmolLM2-135M-Instruct as int4 ONNX: the program's tokens on ONNX Runtime, and in onnxruntime-genai unmodified."""

import json
from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from samples.test_web import ASK, opened, require_browser, served

from graphwright.backends.onnx.exporter import FORMAT
from graphwright.backends.onnx.model import DATA, MODEL, unshaped
from graphwright.backends.onnx.runtime import Session
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.tokenizer import Tokenizer
from graphwright.export_format import Export
from graphwright.passes.kv_cache.explicit_cache import empty_past
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import demo_model, open_model
from graphwright.target import Target

COUNT = 128


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    source = open_model(demo_model())
    options = FORMAT.options()
    captured = capture(source.model, source.example_inputs)
    tokenizer = Path(source.tokenizer_directory)
    source.model = None  # so that its weights are freed
    recipe = FORMAT.recipe(Recipe.load("int4"), options)
    program = rewrite(captured, recipe, Target.parse("cpu"), CompileOptions(verify=False), consume=True)
    FORMAT.write(Export(program, folder, recipe, options, None, tokenizer, lambda _text, _fraction: None))
    return program, folder


def likeliest(program: Program, prompt: list[int], tokens: list[int]) -> list[int]:
    """The program's likeliest token after the prompt and after each of `tokens` but the last, in one forward.

    Equal to `tokens` exactly if these are what the program itself generates greedily.
    """
    ids = torch.tensor([prompt + tokens[:-1]])
    step = {"input_ids": ids, "key_mask": torch.ones_like(ids), "positions": torch.arange(ids.shape[1])[None]}
    return program(**step, **empty_past(program, 1))[0][0, len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.real_model
@pytest.mark.slow
def test_128_greedy_tokens_are_the_programs(exported: tuple[Program, Path]) -> None:
    program, folder = exported
    prompt = Tokenizer(folder).encode("Once upon a time, in a small village by the sea,")
    found, _ = Session(folder).greedy(prompt, COUNT)
    assert len(set(found)) > 20
    assert likeliest(program, prompt, found) == found


@pytest.mark.real_model
@pytest.mark.slow
def test_genai_runs_the_folder_unmodified(exported: tuple[Program, Path]) -> None:
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai", reason="pip install 'graphwright[test]'")
    program, folder = exported
    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    prompt = tokenizer.encode("The capital of France is").tolist()
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 24, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0).tolist()
    assert likeliest(program, prompt, found[len(prompt) :]) == found[len(prompt) :]
    assert "Paris" in tokenizer.decode(found)


@pytest.mark.real_model
@pytest.mark.slow
def test_every_tensor_of_the_file_has_a_type_and_a_shape(exported: tuple[Program, Path]) -> None:
    model = onnx_ir.load(exported[1] / MODEL)
    assert unshaped(model) == []
    onnx.checker.check_model(str(exported[1] / MODEL))


@pytest.mark.real_model
@pytest.mark.slow
def test_the_page_in_the_browser_says_what_onnx_runtime_says(exported: tuple[Program, Path], tmp_path: Path) -> None:
    require_browser()
    folder = exported[1]
    question = "The capital of France is"
    expected, _ = Session(folder).greedy(Tokenizer(folder).encode(question), 6)
    with served(folder) as address, opened(address, tmp_path / "profile") as page:
        assert page.run(ASK, question, 6) == "running"
        page.until("return document.body.dataset.state != 'running'")
        assert json.loads(page.run("return document.body.dataset.tokens")) == expected
        assert "Paris" in page.run("return document.getElementById('output').textContent")


@pytest.mark.real_model
@pytest.mark.slow
def test_the_head_and_the_token_table_are_one_tensor(exported: tuple[Program, Path]) -> None:
    """The file holds what the program holds, and little more: graph, block scales."""
    program, folder = exported
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.weights().values())
    assert (folder / DATA).stat().st_size < 1.15 * weights
