"""Running an exported model on ONNX Runtime, to see that it says what the program says.

session = Session(directory)
tokens, seconds = session.greedy([1, 2, 3], count=16)
"""

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphwright.backends.onnx.model import MODEL
from graphwright.backends.onnx.naming import tensor_name
from graphwright.errors import BackendError

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def import_runtime() -> Any:
    """The module onnxruntime.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            "Running an ONNX model needs the package onnxruntime, which is not installed",
            fix="pip install 'graphwright[onnx]'",
        ) from error


class Session:
    """A loaded model and its input signature.

    Raises:
        BackendError: ONNX Runtime is not installed, or does not load the model.
    """

    def __init__(self, directory: Path, threads: int = 0) -> None:
        onnxruntime = import_runtime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(directory / MODEL), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime does not load {directory / MODEL}: {error}") from error
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}, CPU"
        self.inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self.outputs = [entry.name for entry in self._session.get_outputs()]

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for inputs under the names that the program's contract has."""
        given = {tensor_name(name): tensor.numpy() for name, tensor in tensors.items()}
        taken = {name: array for name, array in given.items() if name in self.inputs}
        return tuple(map(torch.from_numpy, self._session.run(self.outputs, taken)))

    def empty_past(self, batch: int) -> dict[str, Any]:
        """Past tensors of length zero."""
        return {
            name: np.zeros((batch, entry.shape[1], 0, entry.shape[3]), NUMPY[entry.type])
            for name, entry in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, ids: Any, mask: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Logits [B, S, V] of new tokens [B, S] under a mask [B, P + S], and the past of the next step."""
        places = np.clip(np.cumsum(mask, 1) - 1, 0, None)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        taken = {name: array for name, array in given.items() if name in self.inputs}
        logits, *present = self._session.run(self.outputs, {**taken, **past})
        return logits, dict(zip(past, present, strict=True))

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], float]:
        """The `count` likeliest next tokens, one after the other, and the seconds per token after the first."""
        ids, past = np.array([prompt], np.int64), self.empty_past(1)
        tokens: list[int] = []
        started = 0.0
        for _ in range(count):
            mask = np.ones((1, len(prompt) + len(tokens)), np.int64)
            logits, past = self.step(ids, mask, past)
            if not tokens:
                started = time.perf_counter()
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([[tokens[-1]]], np.int64)
        return tokens, (time.perf_counter() - started) / max(1, count - 1)


def padded_batch(vocabulary: int, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [2, length] and their mask; the second sequence is padded on the left."""
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    return ids, mask
