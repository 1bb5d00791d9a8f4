"""Calibration: what flows into chosen nodes while sample inputs run through a program, in bounded memory.

    walk(program, batches, stops, collect=Hessian, visit=quantize)

The graph is executed once, in segments between the chosen nodes. Within a segment the batches run one after another
and only values that later segments need stay in memory; at its end the visitor sees what was collected there and may
replace the weights of linear layers, so that everything after them sees the already quantized prefix (as Frantar et
al. 2022, arXiv:2210.17323, do). No batch ever runs through the whole model at once.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphwright import accuracy
from graphwright.checkpoint import Checkpoint
from graphwright.engine.tokenizer import Tokenizer
from graphwright.errors import PassError, SourceError
from graphwright.feeding import batch_inputs, pool_sizes
from graphwright.pass_ import Context, Pass
from graphwright.program import Program

SAMPLES, LENGTH = 128, 512
"""Windows and tokens per window, unless the user says otherwise."""

RANDOM_SAMPLES, RANDOM_LENGTH = 16, 64


class Collector(Protocol):
    """Gathers statistics of one node's value."""

    def add(self, rows: Tensor) -> None:
        """Takes float32 rows [tokens, K] of one batch, and those of the nodes beside it, if its stop has some."""
        ...


@dataclass
class Hessian:
    """X^T X of everything that flows by, float32 [K, K], and the number of rows."""

    matrix: Tensor = field(default_factory=lambda: torch.zeros(0))
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Adds a batch."""
        if not self.count:
            self.matrix = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.matrix.addmm_(rows.t(), rows)
        self.count += rows.shape[0]


@dataclass
class Channels:
    """Largest and mean magnitude of each channel [K], and at most `kept` rows spread evenly over what flows by."""

    kept: int = 0
    largest: Tensor = field(default_factory=lambda: torch.zeros(0))
    count: int = 0
    _total: Tensor = field(default_factory=lambda: torch.zeros(0))
    _stride: int = 1
    _rows: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Adds a batch."""
        magnitude = rows.abs()
        largest, total = magnitude.amax(0), magnitude.double().sum(0)
        self.largest = torch.maximum(self.largest, largest) if self.count else largest
        self._total = self._total + total if self.count else total
        if self.kept:
            self._keep(rows)
        self.count += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of each channel, float32 [K]."""
        return (self._total / self.count).float()

    @property
    def rows(self) -> Tensor:
        """The rows that were kept, [at most 2 * `kept`, K]."""
        return torch.cat(self._rows)

    def _keep(self, rows: Tensor) -> None:
        self._rows.append(rows[-self.count % self._stride :: self._stride].clone())
        while sum(len(part) for part in self._rows) > 2 * self.kept:
            # Every second of all rows so far, and from now on.
            self._rows = [torch.cat(self._rows)[::2].clone()]
            self._stride *= 2


Collected = TypeVar("Collected", bound=Collector)


Weights = Tensor | tuple[Tensor, Tensor]
"""What a linear layer multiplies with; or the two stacks of a layer of experts."""


@dataclass(frozen=True)
class Stop:
    """A node whose value is observed, and what reports call it.

    Attributes:
        node: the node.
        label: what reports say.
        beside: nodes before it whose values are observed with it; something after it reads them.
        collect: makes its collector; None for the walk's own.
    """

    node: fx.Node
    label: str
    beside: tuple[fx.Node, ...] = ()
    collect: Callable[[], Any] | None = None


def walk(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    stops: Sequence[Stop],
    collect: Callable[[], Collected],
    visit: Callable[[int, Collected], Mapping[fx.Node, Weights]],
    progress: Callable[[str, float], None] = lambda _text, _fraction: None,
    skip: Callable[[int], bool] = lambda _index: False,
) -> None:
    """Runs `batches` through `program` up to the last stop, visiting each stop in graph order.

    Args:
        program: left as it is by the walk; the visitor may edit it, and what runs is a copy.
        batches: inputs by name, or tokens alone; see `graphwright.feeding.batch_inputs`.
        stops: nodes of `program` with a floating-point value [..., K], in graph order.
        collect: makes the collector of one stop.
        visit: called with the index of each stop and what was collected there; returns the weights that linear
            layers and experts of `program`, none of them before the stop, compute with from here on.
        progress: called with the label of each stop.
        skip: whether nothing need be collected at a stop, whose visitor then sees an empty collector.

    Raises:
        PassError: an activation is NaN or infinite; the layer is named.
    """
    run = _Run(program, batches)
    for index, stop in enumerate(stops):
        progress(stop.label, index / len(stops))
        collector = (stop.collect or collect)()
        run.to(stop, None if skip(index) else collector)
        run.weights.update({run.copies[node]: weight for node, weight in visit(index, collector).items()})


def measure(
    one: Pass,
    program: Program,
    context: Context,
    stops: Sequence[Stop],
    collect: Callable[[], Collected],
    reduce: Callable[[int, Collected], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """What `reduce` makes of what is collected at each stop, while no weight changes.

    Args:
        one: the pass that measures.
        program: which is left as it is.
        context: with the calibration data, and the folder in which finished stops are kept.
        stops: as for `walk`; their nodes' names tell them apart.
        collect: makes the collector of one stop.
        reduce: called with the index of each stop that was not finished before.

    Raises:
        PassError: there is nothing to calibrate on, or an activation is NaN or infinite; the layer is named.
    """
    batches = samples(program, context)
    checkpoint = Checkpoint.of(one, program, batches, context)
    found: list[dict[str, Tensor]] = []

    def finished(index: int) -> bool:
        return checkpoint is not None and checkpoint.has(f"measured {stops[index].node.name}")

    def visit(index: int, collected: Collected) -> dict[fx.Node, Tensor]:
        name = f"measured {stops[index].node.name}"
        if checkpoint is not None and finished(index):
            found.append(checkpoint.load(name))
        else:
            found.append(reduce(index, collected))
            if checkpoint is not None:
                checkpoint.save(name, found[-1])
        return {}

    walk(program, batches, stops, collect, visit, context.progress, finished)
    return found


class _Run:
    """A walk in progress: how far it came and what each batch still needs."""

    def __init__(self, program: Program, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.program = program.clone()
        self.nodes = list(self.program.graph.nodes)
        self.copies = dict(zip(program.graph.nodes, self.nodes, strict=True))
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.last_use = {source: node for node in self.nodes for source in node.all_input_nodes}
        self.state = {spec.name: spec for spec in program.contract.state}
        self.inputs = [batch_inputs(self.program, batch, state=False) for batch in batches]
        self.masks = [batch.get("attention_mask") for batch in batches]
        self.live: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.weights: dict[fx.Node, Weights] = {}
        self.done = 0

    def to(self, stop: Stop, collector: Collector | None) -> None:
        """Executes everything up to and including the stop's node."""
        goal = self.copies[stop.node]
        segment = self.nodes[self.done : self.place[goal] + 1]
        with torch.no_grad():
            for batch, values in enumerate(self.live):
                for node in segment:
                    if node.op == "call_function":
                        self._execute(node, batch, values, goal)
                if collector is not None:
                    seen = (goal, *(self.copies[node] for node in stop.beside))
                    collector.add(*(self._rows(self._value(node, batch, values), batch, stop) for node in seen))
                if not goal.users:
                    values.pop(goal, None)
        self.done += len(segment)
        for node in segment:
            self.weights.pop(node, None)

    def _execute(self, node: fx.Node, batch: int, values: dict[fx.Node, Any], goal: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self._value(n, batch, values))
        new = self.weights.get(node)
        if isinstance(new, tuple):
            up, down = (weight.to(args[0].dtype) for weight in new)
            values[node] = node.target(*args[:3], up, args[4], down, *args[6:], **kwargs)
        elif new is not None:
            values[node] = functional.linear(args[0], new.to(args[0].dtype), *args[2:])
        else:
            values[node] = node.target(*args, **kwargs)
        for source in (*node.all_input_nodes, node):
            if self.last_use.get(source, node) is node and source is not goal:
                values.pop(source, None)

    def _value(self, node: fx.Node, batch: int, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.program.weight(node)
        if node.op == "placeholder" and node not in values:
            values[node] = self._placeholder(str(node.target), batch)
        return values[node]

    def _placeholder(self, name: str, batch: int) -> Tensor:
        """An input, or state of zeros that is made when it is first used: the caches of all batches would not fit."""
        if name not in self.state:
            return self.inputs[batch][name]
        spec, contract = self.state[name], self.program.contract
        sizes = {dim.name: dim.min for dim in contract.dims}
        tokens = contract.input("token")
        if tokens is not None:
            shape = self.inputs[batch][tokens.name].shape
            sizes |= {"batch": shape[0], "capacity": shape[1] + 1, **pool_sizes(contract, *shape)}
        return contract.with_(state=(spec,)).allocate(sizes)[name]

    def _rows(self, value: Tensor, batch: int, stop: Stop) -> Tensor:
        mask = self.masks[batch]
        if mask is not None and value.shape[: mask.dim()] == mask.shape:
            value = value[mask.bool()]
        rows = value.reshape(-1, value.shape[-1]).float()
        if not rows.isfinite().all():
            raise PassError(
                "Calibration meets activations that are NaN or infinite",
                where=f"input of {stop.label}, sample {batch}",
                fix="Compile with float32 activations, or give samples that the original model handles",
            )
        return rows


class _Reader(Protocol):
    @property
    def node(self) -> fx.Node: ...


Reader = TypeVar("Reader", bound=_Reader)


def by_input(program: Program, layers: Sequence[Reader]) -> list[tuple[fx.Node, list[Reader]]]:
    """Layers by the tensor that their calls (`node`) read first, in graph order of the tensors."""
    readers: dict[fx.Node, list[Reader]] = {}
    for layer in layers:
        readers.setdefault(layer.node.args[0], []).append(layer)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    return sorted(readers.items(), key=lambda entry: order[entry[0]])


def samples(program: Program, context: Context) -> list[dict[str, Tensor]]:
    """The context's calibration batches, or random ones with a warning.

    Raises:
        PassError: there are none, and random ones cannot be drawn for this program.
    """
    if context.calibration:
        return context.calibration
    tokens = program.contract.input("token")
    if tokens is None:
        raise PassError(
            "This pass measures activations and there are no calibration inputs",
            fix="Give them by name: compile(..., calibration=({'x': tensor},))",
        )
    warnings.warn(
        "There is no calibration text: statistics come from random tokens, which costs accuracy. Give text or tokens",
        stacklevel=2,
    )
    longest = min((dim.max for dim in program.contract.dims if dim.name == "sequence"), default=RANDOM_LENGTH)
    shape = (RANDOM_SAMPLES, min(RANDOM_LENGTH, longest))
    return from_tokens(torch.randint(0, max(tokens.high, 2), shape, generator=context.generator()))


def from_tokens(ids: Tensor) -> list[dict[str, Tensor]]:
    """One batch per row of token ids [samples, length]."""
    return [{"input_ids": row[None].long()} for row in ids]


def from_text(
    tokenizer_directory: Path, text: str | None = None, samples: int = SAMPLES, length: int = LENGTH
) -> list[dict[str, Tensor]]:
    """Windows of a text, or of the part of the built-in text that evaluation does not use.

    Args:
        tokenizer_directory: holds the model's tokenizer.
        text: the text itself.
        samples: at most so many windows, spread evenly over the text.
        length: tokens per window.

    Raises:
        GraphwrightError: the text is shorter than one window.
    """
    content = accuracy.built_in_text(held_out=False) if text is None else text
    tokens = Tokenizer(tokenizer_directory).encode(content)
    windows = accuracy.token_windows(tokens, length, len(tokens))
    chosen = torch.linspace(0, len(windows) - 1, min(samples, len(windows))).long()
    return from_tokens(windows[chosen])


def read_text(file: Path) -> str:
    """The text of a file to calibrate on or to measure on.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The text file {file} cannot be read: {error}") from error
