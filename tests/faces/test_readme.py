"""Every code block of the README and every sample runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from graphwright.manager import plan_passes
from graphwright.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_in_order(tmp_path):
    """One process, as a reader would paste them; the later blocks use names of the earlier ones."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    finished = subprocess.run([sys.executable, "-P", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "tiny-int4" / "manifest.json").is_file()
    assert "model.onnx" in finished.stdout


def test_yaml_blocks_are_recipes():
    found = blocks("yaml")
    assert found
    for block in found:
        assert plan_passes(Recipe.load(yaml.safe_load(block)))


def test_commands_and_options_exist():
    """The command lines of the README are parsed by the real program, with --help in place of running."""
    lines = [line for line in README.splitlines() if line.startswith("graphwright ")]
    assert len(lines) >= 4
    for line in lines:
        command = line.split()[1]
        options = re.findall(r"--[a-z-]+", line)
        shown = subprocess.run(
            [str(Path(sys.executable).parent / "graphwright"), command, "--help"],
            capture_output=True,
            text=True,
            env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
        )
        assert shown.returncode == 0, shown.stderr
        assert all(option in shown.stdout for option in options), line


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in ("demo", "test"))


@pytest.mark.parametrize("name", ["torch_compile.py", "write_a_pass.py"])
def test_samples_without_arguments(name):
    finished = subprocess.run([sys.executable, "-P", str(ROOT / "samples" / name)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    if name == "write_a_pass.py":
        assert "caught: Pass wrong is declared exact" in finished.stdout


def test_samples_over_a_model(tiny_model_directory, tmp_path):
    for name, output in (("ahead_of_time.py", "artifact"), ("edge_export.py", "exported")):
        command = [
            sys.executable,
            "-P",
            str(ROOT / "samples" / name),
            str(tiny_model_directory),
            str(tmp_path / output),
        ]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert (tmp_path / output).exists()
