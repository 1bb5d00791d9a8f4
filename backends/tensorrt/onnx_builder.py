"""Engines through ONNX: the model of a part, what the parser refuses of it, and its engine. Needs no GPU.

    builder = OnnxBuilder()
    path, refusals = builder.prepare(part, folder)      # {node: reason}; empty if TensorRT takes the whole part
    engine = builder.build(path, part, profiles, "sm_89", progress)

Engines are those of TensorRT for RTX.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx as trt
from torch import fx

from graphwright import ops
from graphwright.backend import Progress, Support
from graphwright.backends.onnx import model
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.translate import RefusalError
from graphwright.backends.tensorrt.builder import some
from graphwright.backends.tensorrt.engine import RTX, Draft, Engine, Sizes, serialize
from graphwright.backends.tensorrt.takes import FORMATS
from graphwright.errors import BackendError
from graphwright.match import argument
from graphwright.partition import Part
from graphwright.text import op_name

PROFILE = OnnxOptions(profile="tensorrt")


class OnnxBuilder:
    """Writes parts as ONNX, and has TensorRT for RTX parse and build them."""

    name = f"TensorRT's ONNX parser, onnx {onnx.__version__}"

    def supports(self, node: fx.Node) -> Support:
        """Whether the node has a form that TensorRT's parser takes."""
        if not any(node.target in table for table in model.tables(PROFILE)):
            return Support(False, f"profile tensorrt of ONNX has no translation for {op_name(node.target)}")
        if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
            format = str(argument(node, "format"))
            if format not in FORMATS:
                return Support(False, f"TensorRT has no weights of format {format}")
        return Support(True)

    def prepare(self, part: Part, folder: Path) -> tuple[Path, dict[str, str]]:
        """The model of a part, and the nodes that the translation or TensorRT's parser refuses, with the reasons.

        Raises:
            BackendError: the parser refuses the model, and names nothing that is a node of the part.
        """
        path = folder / model.MODEL
        try:
            model.save(model.build(part.program, PROFILE), folder)
        except RefusalError as refusal:
            return path, {refusal.node: f"profile tensorrt of ONNX: {refusal.problem}"}
        reasons = refused(path)
        found = {name.partition("/")[0]: reason for name, reason in reasons.items()}
        known = {name: f"TensorRT's parser: {reason}" for name, reason in found.items() if name in part.nodes}
        if reasons and not known:
            raise BackendError(f"TensorRT's parser refuses a part of the program: {some(reasons)}")
        return path, known

    def build(
        self, model: Path, part: Part, profiles: Sequence[dict[str, Sizes]], arch: str, progress: Progress
    ) -> Engine:
        """The engine of a part's model.

        Raises:
            BackendError: TensorRT does not parse the model or does not build it; its own words are given.
        """
        return build(model, profiles, arch, progress)


def refused(path: Path) -> dict[str, str]:
    """The nodes of a model that the parser does not take, each with its reason.

    Raises:
        BackendError: the file is no model.
    """
    draft = Draft.begin(RTX)
    parser = trt.OnnxParser(draft.network, draft.log)
    if parser.supports_model_v2(path.read_bytes(), str(path)):
        return {}
    reasons = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reasons[error.node_name() or f"{error.node_operator() or 'model'} {index}"] = error.desc()
    names = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
    for index in range(parser.num_subgraphs):
        if not parser.is_subgraph_supported(index):
            for node in parser.get_subgraph_nodes(index):
                reasons.setdefault(names[node], "it is part of a subgraph that the parser refuses")
    return reasons


def build(path: Path, profiles: Sequence[dict[str, Sizes]], arch: str, progress: Progress) -> Engine:
    """Builds the engine of a model for one compute capability, such as `sm_89`.

    Args:
        path: of the model.
        profiles: sizes of every dimension; see `engine.ranges`.
        arch: the compute capability.
        progress: called with what is being done.

    Raises:
        BackendError: TensorRT does not parse the model or does not build it; its own words are given.
    """
    draft = Draft.begin(RTX)
    parser = trt.OnnxParser(draft.network, draft.log)
    progress("parse for TensorRT", 0.1)
    if not parser.parse_from_file(str(path)):
        raise BackendError(f"TensorRT does not parse the model: {_words(parser, draft.log)}")
    return serialize(draft, profiles, arch, OnnxBuilder.name, progress)


def _words(parser: Any, log: Any) -> str:
    found = [
        f"{e.node_name() or e.node_operator()}: {e.desc()}" for e in map(parser.get_error, range(parser.num_errors))
    ]
    return "; ".join(found or log.errors)[:800]
