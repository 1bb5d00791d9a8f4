"""From a network to a serialized engine, whoever wrote the network: the profiles, the build, and what came out.

    draft = Draft.begin("tensorrt_rtx")          # then write draft.network, by a parser or by converters
    engine = serialize(draft, ranges(contract), "sm_89", maker, progress)
    engine.data, engine.weight_bytes

Engines of TensorRT for RTX are built for a named compute capability, on any machine; the last step, from the engine to
machine code, is done by the runtime on the GPU at hand. Networks are strongly typed: every tensor has the dtype that
the program gives it.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sympy

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

RTX = "tensorrt_rtx"
"""The library that builds for compute capabilities without their GPUs; `tensorrt` builds for the GPU at hand."""

NODE = re.compile(r"([A-Za-z_]\w*)/[A-Z]\w*_\d+")
"""How what a node becomes is named in a network: the node, what it is there, and a number."""

ORIGINS = re.compile(rb"\[(?:ONNX )?Layer: ([^\]\0]+)\]")
"""How a built engine names the nodes that its kernels compute: as the ONNX parser writes it, or `network`."""

WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


@dataclass(frozen=True)
class Tensor:
    """One input or output; -1 is a size of the profile."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Maker:
    """Who made an engine, and with what.

    Attributes:
        builder: what wrote the network, with its version.
        library: the Python package that built the engine, and that alone can load it.
        library_version: of that package.
    """

    builder: str
    library: str
    library_version: str

    def __str__(self) -> str:
        return f"{self.builder}, {self.library} {self.library_version}"


@dataclass(frozen=True)
class Engine:
    """A serialized engine and what it is made of.

    Attributes:
        data: what the runtime loads.
        arch: the compute capability it is for.
        maker: who made it.
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
    maker: Maker
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[dict[str, Sizes], ...]
    weight_bytes: int
    layers: dict[str, int]
    quantized: dict[str, int]
    dequantized: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the data, and the maker, which all engines of a plan have in common."""
        return {key: value for key, value in asdict(self).items() if key not in ("data", "maker")}


class BuildError(BackendError):
    """The builder, which looks closer than what wrote the network, refused it; its words name the node."""


@dataclass(frozen=True)
class Draft:
    """A network that is being written.

    Attributes:
        library: the module of TensorRT that it belongs to.
        log: what the library says, as `errors` and `weight_bytes`.
        builder: the library's builder.
        network: strongly typed, empty at first.
    """

    library: Any
    log: Any
    builder: Any
    network: Any

    @staticmethod
    def begin(library: str) -> "Draft":
        """An empty network of a library."""
        trt = importlib.import_module(library)
        log = _log(trt)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return Draft(trt, log, builder, network)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
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

    return Log()


def serialize(
    draft: Draft, profiles: Sequence[dict[str, Sizes]], arch: str, builder: str, progress: Progress
) -> Engine:
    """Builds the engine of a written network for one compute capability, such as `sm_89`.

    Args:
        draft: the network; its inputs' dimensions have the names that `profiles` have, or the file's.
        profiles: sizes of every dimension; see `ranges`.
        arch: the compute capability; a library other than that for RTX builds for the GPU at hand.
        builder: what wrote the network.
        progress: called with what is being done.

    Raises:
        BackendError: TensorRT does not build the engine; its own words are given.
    """
    trt, network = draft.library, draft.network
    config = draft.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if trt.__name__ == RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, arch), 0)
    for sizes in profiles:
        profile = draft.builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            profile.set_shape(tensor.name, *_shapes(tensor, sizes))
        config.add_optimization_profile(profile)
    progress(f"build the engine for {arch}", 0.3)
    data = draft.builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"TensorRT does not build the engine for {arch}: {'; '.join(draft.log.errors)[:800]}")
    return Engine(
        data=bytes(data),
        arch=arch,
        maker=Maker(builder, trt.__name__, trt.__version__),
        inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
        profiles=tuple(profiles),
        weight_bytes=draft.log.weight_bytes,
        layers=_counts(network),
        quantized=_quantized(trt, network),
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
            three = (size.subs({s: sizes[str(s)][which] for s in size.free_symbols}) for which in range(3))
            sizes[name] = tuple(map(int, three))  # type: ignore[assignment]
    return found if any(dim.name == "sequence" for dim in contract.dims) and contract.state else found[1:]


def _at_most(limit: int, sizes: Sizes) -> Sizes:
    low, usual, high = sizes
    return min(low, limit), min(usual, limit), min(high, limit)


def _capability(trt: Any, arch: str) -> Any:
    name = arch.replace("sm_", "SM")
    if not hasattr(trt.ComputeCapability, name):
        raise BackendError(f"TensorRT {trt.__version__} builds no engines for {arch}")
    return getattr(trt.ComputeCapability, name)


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


def _quantized(trt: Any, network: Any) -> dict[str, int]:
    constants = {layer.get_output(0).name for layer in _layers(network) if layer.type == trt.LayerType.CONSTANT}
    found: dict[str, int] = {}
    for layer in _layers(network):
        if layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).name in constants:
            name = layer.get_input(0).dtype.name
            found[name] = found.get(name, 0) + 1
    return found


def _dequantized(data: bytes) -> tuple[str, ...]:
    names = {found.decode() for found in ORIGINS.findall(data)}
    return tuple(sorted(name for name in names if "/dequantize" in name.lower()))
