"""Finding backends, and what is said when one cannot be imported."""

import importlib

import pytest

from graphwright import registry
from graphwright.errors import BackendError


def missing(name: str):
    """An `import_module` that finds everything but lacks the package `name` when a backend is imported."""
    real = importlib.import_module

    def import_module(module: str, *rest: object):
        if module.startswith("graphwright.backends."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *rest)

    return import_module


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", missing("tvm"))
    with pytest.raises(BackendError, match="Backend tvm needs the package tvm") as raised:
        registry.backend("tvm")
    assert raised.value.fix == "pip install 'graphwright[tvm]'"


def test_a_missing_module_of_ours_is_not_blamed_on_the_user(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", missing("graphwright.kernels.gone"))
    with pytest.raises(ModuleNotFoundError, match=r"graphwright\.kernels\.gone"):
        registry.backend("tvm")


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(BackendError, match="Unknown backend 'inducter'") as raised:
        registry.backend("inducter")
    assert "inductor" in raised.value.fix


def test_a_format_is_called_by_its_name_and_compiles_nothing():
    assert "compressed-tensors" in registry.format_files()
    with pytest.raises(BackendError, match="is a format to export to") as raised:
        registry.backend("compressed_tensors")
    assert raised.value.fix == "graphwright export --format compressed-tensors"
