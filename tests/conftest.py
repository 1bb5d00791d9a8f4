"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest
from families.configs import build


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a Hugging Face directory, without a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(directory)
    return directory
