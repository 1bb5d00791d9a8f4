"""The command line end to end on a tiny model, and every mistake as one paragraph with an exit code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families.configs import build
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graphwright
from graphwright import artifact, cli
from graphwright.errors import ArtifactError
from graphwright.target import Target

COMMAND = str(Path(sys.executable).parent / "graphwright")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tiny_model_directory, tmp_path_factory) -> Path:
    """One artifact for the whole module; compiling is the slow part."""
    output = tmp_path_factory.mktemp("artifacts") / "llama-int8"
    finished = run("compile", tiny_model_directory, "--recipe", "int8", "--output", output, "--json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["speed"]["decode_tokens_per_second"] > 0
    assert {row["name"] for row in report["passes"]} >= {"raise_attention", "static_cache", "rtn"}
    return output


@pytest.fixture
def copied(compiled, tmp_path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "copy"))


def test_a_fresh_process_generates_without_transformers_and_compilers(compiled):
    script = (
        "import sys, graphwright\n"
        f"loaded = graphwright.load({str(compiled)!r})\n"
        "print(loaded.generate([[5, 6, 7], [8]], max_new_tokens=5, eos_token_ids=()).tokens)\n"
        "assert not {'transformers', 'tvm', 'triton', 'torch._dynamo'} & set(sys.modules)\n"
    )
    finished = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    here = graphwright.load(compiled).generate([[5, 6, 7], [8]], max_new_tokens=5, eos_token_ids=())
    assert finished.stdout.strip() == str(here.tokens)


def test_a_compile_for_the_cpu_never_loads_triton(tiny_model_directory, tmp_path):
    script = (
        "import sys\n"
        "from graphwright.cli import main\n"
        f"sys.argv = ['graphwright', 'compile', {str(tiny_model_directory)!r}, '--output', 'out', '--no-measure']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch._dynamo' in sys.modules and 'triton' not in sys.modules\n"
    )
    finished = subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_artifact_equals_its_program(compiled):
    loaded = graphwright.load(compiled)
    ids = torch.randint(0, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    from graphwright.feeding import logits_of
    from graphwright.numerics import relative_error

    assert relative_error(loaded.logits(ids), logits_of(loaded.program, ids)) < 1e-4


def test_reports_and_lists(compiled):
    assert (compiled / "report.html").stat().st_size > 10_000
    shown = run("inspect", compiled)
    assert shown.returncode == 0
    assert "rtn" in shown.stdout
    assert "tiled_linear" in run("inspect", compiled, "--graph").stdout
    measured = run("bench", compiled, "--prompt-tokens", "16", "--new-tokens", "4", "--json")
    assert json.loads(measured.stdout)["prompt_tokens"] == 16
    for command, word in (("passes", "static_cache"), ("recipes", "int4"), ("targets", "cuda:sm_90")):
        listed = run(command, "--json")
        assert listed.returncode == 0
        assert word in listed.stdout
    checked = run("doctor", "--json")
    assert {row["what"] for row in json.loads(checked.stdout)} >= {"torch", "C++ compiler", "backend inductor"}


def test_an_artifact_that_is_there_is_kept_without_force(compiled, tiny_model_directory):
    before = (compiled / "manifest.json").read_text()
    finished = run("compile", tiny_model_directory, "--output", compiled)
    assert finished.returncode != 0
    assert "--force" in finished.stderr
    assert (compiled / "manifest.json").read_text() == before


def test_bisect_finds_nothing_wrong_and_something(tiny_model_directory):
    fine = run("bisect", tiny_model_directory, "--recipe", "none")
    assert "nothing to bisect" in fine.stdout, fine.stderr
    found = run("bisect", tiny_model_directory, "--recipe", "int4", "--kl", "1e-5", "--json")
    assert json.loads(found.stdout)["pass_name"] == "rtn", found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "MODEL", "-o", "OUT", "--recipe", "int9"), "Unknown recipe 'int9'"),
        (("compile", "MODEL", "-o", "OUT", "--target", "cpuu"), "Unknown target 'cpuu'. Did you mean cpu?"),
        (
            ("compile", "MODEL", "-o", "OUT", "--target", "cuda:sm_99"),
            "Unknown target 'cuda:sm_99'. Did you mean cuda:sm_90?",
        ),
        (("compile", "MODEL", "-o", "OUT", "--also", "cuda:sm_90"), "compiles for cpu, and cuda:sm_90 is cuda"),
        (("compile", "MODEL", "-o", "OUT", "--backend", "tvmm"), "Unknown backend 'tvmm'"),
        (("compile", "missing.gguf", "-o", "OUT"), "missing.gguf"),
        (("compile", "no.such.module:factory", "-o", "OUT"), "no.such.module"),
        (("compile", "MODEL", "-o", "OUT", "--calibration", "missing.txt"), "The text file missing.txt cannot be read"),
        (("run", "nowhere", "hello"), "no Graphwright artifact"),
        (("export", "MODEL", "-o", "OUT", "--format", "onxx"), "Unknown export format 'onxx'"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message, tiny_model_directory, tmp_path):
    places = {"MODEL": str(tiny_model_directory), "OUT": str(tmp_path / "out")}
    finished = run(*(places.get(a, a) for a in arguments))
    assert finished.returncode not in (0, 1)
    assert message in finished.stderr.replace("\n", " ")
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_every_option_of_compile_reaches_the_compiler(monkeypatch, tmp_path):
    seen = {}

    class ReachedError(Exception):
        pass

    def compiler(model, recipe, target, *, options):
        seen.update(vars(options), model=model, recipe=recipe, target=target)
        raise ReachedError

    monkeypatch.setattr(graphwright, "compile", compiler)
    (tmp_path / "text.txt").write_text("some words")
    given = {
        "--recipe": "int4-gptq",
        "--target": "cuda:sm_90",
        "--also": "cuda:sm_80",
        "--backend": "triton",
        "--dump": str(tmp_path / "dump"),
        "--seed": "7",
        "--calibration": str(tmp_path / "text.txt"),
        "--calibration-samples": "3",
        "--calibration-length": "17",
        "--checkpoint": str(tmp_path / "layers"),
        "--length": "96",
    }
    flat = [part for pair in given.items() for part in pair]
    result = CliRunner().invoke(cli.app, ["compile", "MODEL", "-o", str(tmp_path / "out"), "--no-verify", *flat])
    assert isinstance(result.exception, ReachedError)
    assert (seen["model"], seen["recipe"], seen["target"], seen["also"]) == (
        "MODEL",
        "int4-gptq",
        "cuda:sm_90",
        ("cuda:sm_80",),
    )
    assert (seen["backend"], seen["verify"], seen["seed"]) == ("triton", False, 7)
    assert (seen["calibration_text"], seen["calibration_samples"], seen["calibration_length"]) == ("some words", 3, 17)
    assert seen["lengths"] == (96,)
    assert (seen["dump"], seen["checkpoint"]) == (tmp_path / "dump", tmp_path / "layers")


def test_debug_shows_the_traceback(tmp_path):
    finished = run("compile", "missing.gguf", "-o", tmp_path / "out", "--debug")
    assert "Traceback" in finished.stderr


def test_text_without_a_tokenizer_is_explained(compiled):
    finished = run("run", compiled, "hello")
    assert finished.returncode == 12, finished.stderr
    assert "tokenizer" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_nan_weights_are_refused(tiny_model_directory, tmp_path):
    model = Path(shutil.copytree(tiny_model_directory, tmp_path / "nan"))
    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if "up_proj" in n)
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    finished = run("compile", model, "-o", tmp_path / "out")
    assert finished.returncode == 4
    assert f"{name} holds 1 values that are NaN" in finished.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_truncated_files_are_refused(copied):
    weights = copied / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="weights.safetensors is .* bytes long and should be"):
        graphwright.load(copied)


def test_altered_files_are_refused(copied):
    program = copied / "program.json"
    program.write_text(program.read_text().replace("0", "1", 1))
    with pytest.raises(ArtifactError, match="program.json was altered"):
        graphwright.load(copied)


def test_missing_files_are_refused(copied):
    next((copied / "kernels").glob("*")).unlink()
    with pytest.raises(ArtifactError, match="is missing from the artifact"):
        graphwright.load(copied)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "artifact of format 99"),
        ("torch", "2.1.0", "compiled with torch 2.1.0"),
        ("arch", "riscv64", "compiled for cpu \\(riscv64\\)"),
        ("features", ["sve9"], "features that this machine lacks: sve9"),
    ],
)
def test_wrong_versions_and_machines_are_refused(copied, key, value, message):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ArtifactError, match=message):
        graphwright.load(copied)


def test_loading_for_another_target_is_refused(compiled):
    with pytest.raises(ArtifactError, match="compiled for cpu"):
        artifact.verify(compiled, Target.parse("cuda:sm_90"))


def test_a_failed_write_leaves_nothing(tmp_path):
    final = tmp_path / "artifact"
    with pytest.raises(RuntimeError, match="half way"), artifact.atomic_directory(final) as work:
        (work / "file").write_text("x")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_foreign_directories_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(ArtifactError, match="is no Graphwright artifact"),
        artifact.atomic_directory(tmp_path, overwrite=True),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_plain_module_from_a_factory(tmp_path):
    """Not a language model: captured, compiled, saved, loaded, equal."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).eval()
    compiled = graphwright.compile(model, "none", example_inputs={"input": torch.randn(3, 8)})
    compiled.save(tmp_path / "plain")
    x = torch.randn(5, 8)
    from graphwright.errors import GenerationError
    from graphwright.numerics import relative_error

    loaded = graphwright.load(tmp_path / "plain")
    assert relative_error(loaded(input=x)[0], model(x)) < 1e-5
    with pytest.raises(GenerationError, match="causal"):
        loaded.generate([[1, 2]])


def test_an_encoder_is_compiled_and_refuses_to_generate():
    model = build("bert")
    compiled = graphwright.compile(model, "none")
    ids = torch.randint(0, 128, (2, 5))
    mask = torch.ones_like(ids)
    from graphwright.errors import GenerationError
    from graphwright.numerics import relative_error

    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
    assert relative_error(compiled(input_ids=ids, attention_mask=mask)[0], expected) < 1e-3
    with pytest.raises(GenerationError, match="causal"):
        compiled.generate([[1, 2]])
