"""From an ONNX model to a serialized engine, on any machine: what the parser takes, the profiles, and the build.

    refusals = refused(path)                     # {node: reason}; empty if TensorRT takes the whole model
    engine = build(path, ranges(contract), "sm_89", progress)
    engine.data, engine.weight_bytes

Engines are those of TensorRT for RTX: built ahead of time for a compute capability, without a GPU; the last step, from
the engine to machine code, is done by the runtime on the GPU at hand. Networks are strongly typed: every tensor has the
dtype that the program gives it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import sympy
import tensorrt_rtx as trt

from graphwright.backend import Progress
from graphwright.backends.onnx.naming import DIMS
from graphwright.contract import Contract
from graphwright.errors import BackendError

Sizes = tuple[int, int, int]
"""The smallest, the usual and the largest size of a dimension."""

BATCH, DECODE_BATCH = (1, 1, 8), (1, 1, 64)
PROMPT, USUAL_PROMPT, USUAL_KEYS = 4096, 512, 1024

CONTRACT_DIMS = {file: contract for contract, file in DIMS.items()}
"""The contract's name of each dimension that the file calls otherwise."""

ORIGINS = re.compile(rb"\[ONNX Layer: ([^\]\0]+)\]")
"""How a built engine names the nodes that its kernels compute."""

WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


@dataclass(frozen=True)
class Tensor:
    """One input or output; -1 is a size of the profile."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """A serialized engine and what it is made of.

    Attributes:
        data: what the runtime loads.
        arch: the compute capability it is for.
        inputs: in the network's order.
        outputs: in the network's order.
        profiles: per profile, the three sizes of every dimension that is not fixed.
        weight_bytes: memory that the engine's weights take on the device.
        layers: number of the network's layers by type.
        quantized: number of weights that are dequantized in the network, by the dtype of their codes.
        dequantized: nodes of the model that dequantize in the built engine, as its own layer information says; what a
            builder folds into dense weights is not among them. The engine inspector proper needs a GPU's driver.
    """

    data: bytes = field(repr=False)
    arch: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[dict[str, Sizes], ...]
    weight_bytes: int
    layers: dict[str, int]
    quantized: dict[str, int]
    dequantized: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the data."""
        return {key: value for key, value in asdict(self).items() if key != "data"}


class BuildError(BackendError):
    """The builder, which looks closer than the parser, refused a model; its words name the node."""


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what TensorRT says, instead of printing it."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.weight_bytes = 0

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)
        found = WEIGHTS.search(message)
        if found:
            self.weight_bytes = int(found.group(1))


def refused(path: Path) -> dict[str, str]:
    """The nodes of a model that the parser does not take, each with its reason.

    Raises:
        BackendError: the file is no model.
    """
    log = _Log()
    _, parser = _network(log)[1:]
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
        profiles: sizes of every dimension; see `ranges`.
        arch: the compute capability.
        progress: called with what is being done.

    Raises:
        BackendError: TensorRT does not parse the model or does not build it; its own words are given.
    """
    log = _Log()
    builder, network, parser = _network(log)
    progress("parse for TensorRT", 0.1)
    if not parser.parse_from_file(str(path)):
        raise BackendError(f"TensorRT does not parse the model: {_words(parser, log)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(_capability(arch), 0)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            profile.set_shape(tensor.name, *_shapes(tensor, sizes))
        config.add_optimization_profile(profile)
    progress(f"build the engine for {arch}", 0.3)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"TensorRT does not build the engine for {arch}: {'; '.join(log.errors)[:800]}")
    return Engine(
        data=bytes(data),
        arch=arch,
        inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
        profiles=tuple(profiles),
        weight_bytes=log.weight_bytes,
        layers=_counts(network),
        quantized=_quantized(network),
        dequantized=_dequantized(bytes(data)),
    )


def ranges(contract: Contract, more: Mapping[str, sympy.Expr] | None = None) -> list[dict[str, Sizes]]:
    """The sizes of two profiles: decode, with one new token, and prefill.

    Args:
        contract: of the whole program.
        more: sizes of a part that the contract has no name for, over those that it has.
    """
    found: list[dict[str, Sizes]] = [{}, {}]
    for dim in contract.dims:
        decode = prefill = (dim.min, min(USUAL_KEYS, dim.max), dim.max)
        if dim.name == "batch":
            decode, prefill = DECODE_BATCH, BATCH
        elif dim.name in ("sequence", "logits"):
            decode = (1, 1, 1)
            prefill = (1, min(USUAL_PROMPT if dim.name == "sequence" else 1, dim.max), min(PROMPT, dim.max))
        found[0][dim.name], found[1][dim.name] = (_at_most(dim.max, sizes) for sizes in (decode, prefill))
    for sizes in found:
        for name, size in (more or {}).items():
            three = (size.subs({str(s): sizes[str(s)][which] for s in size.free_symbols}) for which in range(3))
            sizes[name] = tuple(map(int, three))  # type: ignore[assignment]
    return found if any(dim.name == "sequence" for dim in contract.dims) and contract.state else found[1:]


def _at_most(limit: int, sizes: Sizes) -> Sizes:
    low, usual, high = sizes
    return min(low, limit), min(usual, limit), min(high, limit)


def _network(log: _Log) -> tuple[Any, Any, Any]:
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return builder, network, trt.OnnxParser(network, log)


def _capability(arch: str) -> Any:
    name = arch.replace("sm_", "SM")
    if not hasattr(trt.ComputeCapability, name):
        raise BackendError(f"TensorRT {trt.__version__} builds no engines for {arch}")
    return getattr(trt.ComputeCapability, name)


def _words(parser: Any, log: _Log) -> str:
    found = [
        f"{e.node_name() or e.node_operator()}: {e.desc()}" for e in map(parser.get_error, range(parser.num_errors))
    ]
    return "; ".join(found or log.errors)[:800]


def _shapes(tensor: Any, sizes: Mapping[str, Sizes]) -> list[tuple[int, ...]]:
    found = (tensor.get_dimension_name(axis) for axis in range(len(tensor.shape)))
    names = [CONTRACT_DIMS.get(name, name) for name in found]
    return [
        tuple(sizes[name][which] if size == -1 else size for name, size in zip(names, tensor.shape, strict=True))
        for which in range(3)
    ]


def _tensor(tensor: Any) -> Tensor:
    return Tensor(tensor.name, tensor.dtype.name, tuple(tensor.shape))


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def _counts(network: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in _layers(network):
        found[layer.type.name] = found.get(layer.type.name, 0) + 1
    return found


def _quantized(network: Any) -> dict[str, int]:
    constants = {layer.get_output(0).name for layer in _layers(network) if layer.type == trt.LayerType.CONSTANT}
    found: dict[str, int] = {}
    for layer in _layers(network):
        if layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).name in constants:
            name = layer.get_input(0).dtype.name
            found[name] = found.get(name, 0) + 1
    return found


def _dequantized(data: bytes) -> tuple[str, ...]:
    names = {found.decode() for found in ORIGINS.findall(data)}
    return tuple(sorted(name for name in names if "/DequantizeLinear_" in name))
