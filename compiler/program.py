"""The program: a graph that always runs, its weights, its contract, and what has been done to it.

    program = graphwright.capture(model)
    logits, = program(input_ids=ids, attention_mask=mask)
    print(program.text())
    program.save(directory); program = Program.load(directory)

The graph is a `torch.fx.GraphModule` of ATen and semantic ops whose placeholders are the contract's inputs and
state, in that order, and whose output is a tuple of tensors. Weights are its parameters and buffers. Every node
carries `meta["val"]`, a fake tensor with the symbolic dimensions of the contract.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from graphwright import serialize, shapes, text
from graphwright.contract import Contract
from graphwright.errors import GraphwrightError

CACHE_LINE = 64
"""Bytes."""


@dataclass(frozen=True)
class Metadata:
    """What is known of the model besides its graph."""

    name: str = "model"
    family: str = "module"
    causal: bool = False
    vocab_size: int = 0
    context_length: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    parameter_bytes: int = 0
    tokenizer: str | None = None
    """Directory of the tokenizer's files while compiling; inside an artifact it is `tokenizer`."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the model was read."""

    def with_(self, **changes: Any) -> "Metadata":
        """A copy with some fields replaced."""
        return replace(self, **changes)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Metadata":
        """Rebuilds metadata from plain data."""
        tuples = {"eos_token_ids": tuple(data["eos_token_ids"]), "notes": tuple(data.get("notes", ()))}
        return Metadata(**{**data, **tuples})


@dataclass
class PassRecord:
    """One line of a program's history."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: int = 0
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    error: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Program:
    """A captured model on its way through the compiler."""

    def __init__(
        self,
        module: fx.GraphModule,
        contract: Contract,
        metadata: Metadata | None = None,
        history: tuple[PassRecord, ...] = (),
        *,
        shaped: bool = True,
    ) -> None:
        self._shaped = shaped
        self.module = module
        self.contract = contract
        self.metadata = metadata or Metadata()
        self.history = history

    @property
    def graph(self) -> fx.Graph:
        """The graph; edit it through `graphwright.rewrite.Editor` only."""
        if not self._shaped:
            # A program that was loaded to be run needs no shapes, and they take longer than all else in loading it.
            shapes.propagate(self.module, self.contract)
            self._shaped = True
        return self.module.graph

    def __call__(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the program eagerly; inputs and state by name, state is written in place.

        Raises:
            GraphwrightError: a missing input, or one of the wrong dtype or shape.
        """
        unknown = set(tensors) - set(self.contract.names)
        if unknown:
            raise GraphwrightError(
                f"The program takes no input called {', '.join(sorted(unknown))}",
                fix=f"It takes {', '.join(self.contract.names)}",
            )
        self.contract.check(tensors)
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self.module(*(tensors[name] for name in self.contract.names))
        return outputs

    def weights(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads with `get_attr`, by name, in order of use."""
        return {str(n.target): self.weight(n) for n in self.module.graph.nodes if n.op == "get_attr"}

    def weight(self, node: fx.Node | str) -> Tensor:
        """The tensor behind a `get_attr` node or name."""
        return attribute(self.module, str(node.target) if isinstance(node, fx.Node) else node)

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """All call nodes of these targets, in graph order; all call nodes when none is given."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def text(self, *, shapes: bool = True) -> str:
        """The canonical text of the graph: one line per node, numbered by position."""
        return text.render(self, shapes=shapes)

    def clone(self) -> "Program":
        """A copy with its own graph that shares weights with this one."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        module = fx.GraphModule(self.module, graph)
        for source, target in zip(self.graph.nodes, graph.nodes, strict=True):
            target.meta = copy.copy(source.meta)
        return Program(module, self.contract, self.metadata, self.history)

    def shape_only(self) -> "Program":
        """A clone whose weights are on the meta device: enough to report on, and no memory."""
        clone = self.clone()
        for part in clone.module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to("meta")
        return clone

    @property
    def is_meta(self) -> bool:
        """Whether the weights have no values; see `shape_only`."""
        return any(weight.is_meta for weight in self.weights().values())

    def with_(self, **changes: Any) -> "Program":
        """The same graph with another contract, metadata or history."""
        fields = {"contract": self.contract, "metadata": self.metadata, "history": self.history}
        return Program(self.module, shaped=self._shaped, **{**fields, **changes})

    def save(self, directory: Path | str) -> None:
        """Writes `program.json` and `weights.safetensors` into an existing directory."""
        folder = Path(directory)
        save_weights(unshared(self.weights()), folder / "weights.safetensors")
        (folder / "program.json").write_text(json.dumps(self.to_json(), indent=1))

    def to_json(self) -> dict[str, Any]:
        """Graph, contract, metadata and history as plain data, without weights."""
        return {
            "metadata": asdict(self.metadata),
            "contract": self.contract.to_json(),
            "history": [asdict(record) for record in self.history],
            "graph": serialize.graph_to_json(self.graph),
        }

    @staticmethod
    def load(directory: Path | str, weights: Mapping[str, Tensor] | None = None) -> "Program":
        """Reads what `save` wrote; `weights` replaces the file's tensors, which are memory-mapped otherwise."""
        folder = Path(directory)
        data = json.loads((folder / "program.json").read_text())
        return Program.from_json(data, weights or load_weights(folder / "weights.safetensors"))

    @staticmethod
    def from_json(data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> "Program":
        """Rebuilds a program from `to_json` and its weights."""
        contract = Contract.from_json(data["contract"])
        module = serialize.graph_from_json(data["graph"], weights)
        history = tuple(PassRecord(**record) for record in data["history"])
        return Program(module, contract, Metadata.from_json(data["metadata"]), history, shaped=False)


def save_weights(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file whose data begin a cache line.

    Weights are mapped into memory as they lie in the file, and kernels that load vectors want them aligned.
    """
    save_file(tensors, file, {"padding": ""})
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    if header % CACHE_LINE:
        save_file(tensors, file, {"padding": " " * (-header % CACHE_LINE)})


def attribute(module: torch.nn.Module, name: str) -> Tensor:
    """The tensor at a dotted attribute path."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    tensor: Tensor = value
    return tensor


def load_weights(file: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors of a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def unshared(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, copied only where two share memory, as safetensors demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        dense = tensor.detach().contiguous()
        if dense.untyped_storage().data_ptr() in seen or dense.untyped_storage().nbytes() != dense.nbytes:
            dense = dense.clone()
        seen.add(dense.untyped_storage().data_ptr())
        result[name] = dense
    return result
