"""A program as a checked ONNX model, in memory and on disk.

model = build(program, OnnxOptions(profile="ort"))
save(model, directory)                    # model.onnx and model.onnx.data
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from graphwright.backends.onnx.aten import ATEN
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.ort import ORT
from graphwright.backends.onnx.quantized import QUANTIZED
from graphwright.backends.onnx.semantic import SEMANTIC
from graphwright.backends.onnx.translate import SIZES, OfNode, Translation, Translator
from graphwright.backends.onnx.trt import TENSORRT
from graphwright.errors import BackendError
from graphwright.program import Program

MODEL, DATA = "model.onnx", "model.onnx.data"

INLINE_BYTES = 1024
"""Tensors up to this size stay in the model's own file, where shape inference reads them."""


def tables(options: OnnxOptions) -> list[Mapping[Any, Translation | OfNode]]:
    """The translations of a profile, the preferred ones first."""
    standard: list[Mapping[Any, Translation | OfNode]] = [SEMANTIC, QUANTIZED, ATEN, SIZES]
    own: dict[str, list[Mapping[Any, OfNode]]] = {"ort": [ORT], "tensorrt": [TENSORRT], "standard": []}
    return [*own[options.profile], *standard]


def build(program: Program, options: OnnxOptions) -> ir.Model:
    """The program as a model with the shape of every value.

    Raises:
        BackendError: the profile has no translation for a node.
    """
    model = Translator(program, options, tables(options)).model()
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    ShapeInferencePass(data_prop=True, strict_mode=False)(model)
    return model


def save(model: ir.Model, directory: Path) -> None:
    """Writes the model and its weights into an existing directory, and checks what was written.

    Raises:
        BackendError: the checker found the model invalid.
    """
    path = directory / MODEL
    ir.save(model, path, external_data=DATA, size_threshold_bytes=INLINE_BYTES)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise BackendError(f"The ONNX model is not valid: {error}", fix="This is a defect of the export") from error


def unshaped(model: ir.Model) -> list[str]:
    """Names of values whose dtype or shape is not known."""
    return [
        str(value.name)
        for node in model.graph
        for value in node.outputs
        if value.name and (value.dtype is None or value.shape is None)
    ]
