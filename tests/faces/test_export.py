"""`export` is the same for every format: options, refusals, hashes, verification, report, and nothing half-written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families.configs import build
from torch import nn
from typer.testing import CliRunner

import graphwright
from graphwright import artifact, exporting, formats, registry
from graphwright.cli import app
from graphwright.errors import ArtifactError, BackendError
from graphwright.formats import torch_export
from graphwright.report.data import Report

INT8 = {"passes": ["static_cache", {"rtn": {"bits": 8, "group_size": 0, "symmetric": True}}]}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)).eval()


CASES = {
    "onnx": lambda out: graphwright.export(build("llama"), "onnx", out, recipe=INT8, verify=True),
    "torch-export": lambda out: graphwright.export(build("llama"), "torch-export", out, recipe=INT8, verify=True),
    "aoti": lambda out: graphwright.export(
        plain(), "aoti", out, recipe="none", verify=True, example_inputs={"input": torch.randn(3, 6)}
    ),
}


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory) -> tuple[str, Path]:
    """Each format once."""
    folder = tmp_path_factory.mktemp("exports") / request.param
    assert CASES[request.param](folder) == folder
    return request.param, folder


def test_the_manifest_names_every_file_with_its_hash(written):
    name, folder = written
    manifest = artifact.read_manifest(folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {artifact.MANIFEST}
    assert set(manifest.files) == files
    for file, entry in manifest.files.items():
        assert entry == {"bytes": (folder / file).stat().st_size, "sha256": artifact.digest(folder / file)}
    assert manifest.export["format"] == name
    assert manifest.export["options"] == registry.export_format(name).options().model_dump(mode="json")


def test_it_was_run_and_the_report_says_so(written):
    name, folder = written
    verified = artifact.read_manifest(folder).export["verified"]
    assert verified["relative_error"] < 1e-4
    assert (verified["tokens_per_second"] or 0) > 0 or name == "aoti"
    report = Report.load(folder / "report.json")
    assert report.export["verified"] == verified
    assert report.export["files"].keys() <= artifact.read_manifest(folder).files.keys()
    if name == "onnx":  # caches that are handed in and out save as much work as those in place
        rows = {(row["phase"], row["side"]): row for row in report.estimates}
        assert (
            rows["decode after 128", "after"]["sizes"] | {"past": 128, "sequence": 1, "total": 129}
            == (rows["decode after 128", "after"]["sizes"])
        )
    page = (folder / "report.html").read_text()
    assert "Verified by running it" in page
    assert verified["runtime"] in page


def test_an_export_for_other_runtimes_is_not_loaded_as_an_artifact(written):
    name, folder = written
    if name == "aoti":
        x = torch.randn(5, 6)
        torch.testing.assert_close(graphwright.load(folder)(input=x)[0], plain()(x), rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(ArtifactError, match=f"an export in the format {name}"):
        graphwright.load(folder)


def test_torch_export_takes_the_contracts_inputs_in_order(written):
    name, folder = written
    if name != "torch-export":
        return
    found, facts = torch_export.load(folder), artifact.read_manifest(folder).export
    names = [s.arg.name for s in found.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    assert len(names) == len(facts["inputs"])
    assert facts["inputs"][0] == "input_ids"
    assert any("quantized_linear" in str(node.target) for node in found.graph.nodes)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("onxx", {}, "Unknown export format 'onxx'. Did you mean onnx"),
        ("torch_export", {}, "Did you mean torch-export"),
        ("torch-export", {"opset": 20}, "torch-export has no option 'opset'. It has no options"),
        ("onnx", {"profil": "ort"}, "no option 'profil'.*Did you mean profile"),
        ("onnx", {"opset": 20, "profile": "tensorrt"}, "Options of onnx: profile tensorrt needs opset 24"),
    ],
)
def test_wrong_names_are_refused_before_the_model_is_read(format, options, message, tmp_path):
    with pytest.raises(BackendError, match=message):
        exporting.export("nowhere", format, tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch):
    inputs, right = {"input": torch.randn(3, 6)}, torch_export.exported_program
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)).eval()
    monkeypatch.setattr(torch_export, "exported_program", lambda _: right(graphwright.capture(other, inputs)))
    with pytest.raises(BackendError, match="does not compute what the program computes"):
        exporting.export(plain(), "torch-export", tmp_path / "out", recipe="none", verify=True, example_inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    out = tmp_path / "out"
    graphwright.export(plain(), "torch-export", out, recipe="none", example_inputs={"input": torch.randn(3, 6)})
    before = artifact.read_manifest(out).files
    with pytest.raises(ArtifactError, match="--force"):
        graphwright.export(plain(), "torch-export", out, recipe="none", example_inputs={"input": torch.randn(3, 6)})
    monkeypatch.setattr(torch.export, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        graphwright.export(
            plain(), "torch-export", out, recipe="none", overwrite=True, example_inputs={"input": torch.randn(3, 6)}
        )
    assert artifact.read_manifest(out).files == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt(*_arguments: object, **_named: object) -> None:
    raise KeyboardInterrupt


def test_a_failed_rename_brings_the_old_directory_back(tmp_path, monkeypatch):
    with artifact.atomic_directory(tmp_path / "out") as work:
        (work / artifact.MANIFEST).write_text("old")
    real, calls = artifact.os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("full")
        real(source, target)

    monkeypatch.setattr(artifact.os, "replace", second_fails)
    with pytest.raises(OSError, match="full"), artifact.atomic_directory(tmp_path / "out", overwrite=True) as work:
        (work / artifact.MANIFEST).write_text("new")
    assert (tmp_path / "out" / artifact.MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_format_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "just_names.py").write_text(
        "from graphwright.export_format import Format\n"
        "class JustNames(Format):\n"
        "    name = 'just-names'\n"
        "    def write(self, export):\n"
        "        (export.directory / 'names.txt').write_text('\\n'.join(export.program.weights()))\n"
        "        return {'tensors': len(export.program.weights())}\n"
        "FORMAT = JustNames()\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    registry.format_files.cache_clear()
    try:
        given = {"example_inputs": {"input": torch.randn(3, 6)}, "recipe": "none"}
        out = graphwright.export(plain(), "just-names", tmp_path / "out", **given)
        assert (out / "names.txt").read_text().splitlines() == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert artifact.read_manifest(out).export["tensors"] == 4
        with pytest.raises(BackendError, match="Nothing here runs models of format just-names"):
            graphwright.export(plain(), "just-names", tmp_path / "two", verify=True, **given)
        assert not (tmp_path / "two").exists()
    finally:
        registry.format_files.cache_clear()
        sys.modules.pop("graphwright.formats.just_names", None)


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("graphwright.backends.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendError, match=r"Format onnx needs the package onnx_ir.*graphwright\[onnx\]"):
        exporting.export("nowhere", "onnx", tmp_path / "out")


COMMAND = (sys.executable, "-P", "-c", "from graphwright.cli import main; main()")


def test_the_command_line_prints_one_document(tiny_model_directory, tmp_path):
    command = ["export", str(tiny_model_directory), "-o", str(tmp_path / "out"), "--format", "onnx"]
    finished = CliRunner().invoke(app, [*command, "--recipe", "int8", "--option", "opset=24", "--verify", "--json"])
    assert finished.exit_code == 0, finished.output
    found = json.loads(finished.stdout)
    assert found["output"] == str(tmp_path / "out")
    assert found["export"]["options"]["opset"] == 24
    assert found["export"]["verified"]["relative_error"] < 1e-3
    assert found["export"]["files"]["model.onnx"] > 0
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, ArtifactError)
    assert "holds an artifact already" in str(again.exception)
    wrong = CliRunner().invoke(app, [*command, "--force", "--option", "opset"])
    assert "--option takes name=value" in str(wrong.exception)


def test_a_process_that_is_told_to_end_leaves_nothing(tiny_model_directory, tmp_path):
    """The signal comes when the temporary directory is there, so the export has begun."""
    command = [*COMMAND, "export", str(tiny_model_directory), "-o", str(tmp_path / "out"), "--format", "onnx"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_formats_are_listed_with_their_options():
    finished = CliRunner().invoke(app, ["formats", "--json"])
    assert finished.exit_code == 0, finished.output
    rows = json.loads(finished.stdout)
    assert {"onnx", "torch-export", "aoti", "tensorrt"} <= {row["format"] for row in rows}
    assert {"profile", "opset", "decompose"} <= {row["option"] for row in rows if row["format"] == "onnx"}
