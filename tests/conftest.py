"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

# Triton decides at import whether kernels are interpreted; they are in tests, and compiled in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from families.configs import build


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a Hugging Face directory, without a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(directory)
    return directory
