"""Looking after an installation: what is here, what is missing, and what to do about it."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from graphwright import registry
from graphwright.errors import GraphwrightError
from graphwright.target import host

OPTIONAL = {
    "transformers": "reading Hugging Face models: pip install 'graphwright[hf]'",
    "gguf": "reading GGUF files: pip install 'graphwright[hf]'",
    "triton": "compiling for GPUs: pip install 'graphwright[triton]'",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    state: Literal["ok", "missing", "broken"]
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Everything worth knowing before a compile, worst news included."""
    return [
        Finding("python", "ok", sys.version.split()[0]),
        Finding("torch", "ok", torch.__version__),
        *(_package(name, use) for name, use in OPTIONAL.items()),
        _compiler(),
        _cpu(),
        _shadowing(),
        *(_backend(name) for name in registry.backend_names()),
        _openmp(),
    ]


def _package(name: str, use: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "missing", "", f"Needed for {use}")
    return Finding(name, "ok", metadata.version(name))


def _compiler() -> Finding:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        return Finding(
            "C++ compiler", "broken", "", "The inductor backend needs g++ or clang++: install one, or set CXX"
        )
    return Finding("C++ compiler", "ok", found)


def _cpu() -> Finding:
    target = host()
    fast = {"avx2", "avx512f", "asimd"} & set(target.features)
    advice = "" if fast else "No vector instructions were found: expect slow kernels"
    return Finding("cpu", "ok" if fast else "broken", f"{target.arch} {' '.join(target.features)}", advice)


def _shadowing() -> Finding:
    """A folder called `kernels` on the path hides the package of that name from transformers."""
    here = [entry for entry in sys.path if (Path(entry or ".") / "kernels" / "__init__.py").is_file()]
    own = [entry for entry in here if (Path(entry or ".") / "passes").is_dir()]
    if own:
        advice = "Set PYTHONSAFEPATH=1: the repository's folders must not be importable by their bare names"
        return Finding("import path", "broken", str(Path(own[0]).absolute()), advice)
    return Finding("import path", "ok", "no shadowed packages")


def _backend(name: str) -> Finding:
    try:
        kinds = registry.backend(name).kinds
    except (ImportError, GraphwrightError) as error:
        return Finding(f"backend {name}", "broken", str(error), "Reinstall graphwright")
    return Finding(f"backend {name}", "ok", ", ".join(kinds))


def _openmp() -> Finding:
    """Passive waiting makes every parallel region of a token step sleep and wake: three times slower, measured."""
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "passive":
        return Finding("OpenMP", "broken", f"OMP_WAIT_POLICY={policy}", "Unset it: decoding is about 3 times slower")
    return Finding("OpenMP", "ok", f"{torch.get_num_threads()} threads")
