"""What every weight quantizer shares, so that a method is one short file.

    class Rtn(IntegerQuantizer):
        name = "rtn"

        def solve(self, weight, scheme, statistics):
            return rounding.quantize(weight, scheme)

The base finds the layers, chooses each one's scheme, hands a method that is `calibrated` the statistics of each
layer's inputs as they are behind the already quantized prefix, and installs the packed weights in the graph. The
vocabulary head and the token embedding are rounded to nearest with widths of their own; where they are one tied matrix
and agree, they share the packed one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, field_validator
from torch import Tensor, fx

from graphwright import allocation, calibration, rounding, structure
from graphwright.calibration import Collector, Stop, Weights
from graphwright.checkpoint import Checkpoint
from graphwright.errors import PassError
from graphwright.expert_quantizer import (
    ExpertLayer,
    Routed,
    SolvedExperts,
    expert_layers,
    install_experts,
    solve_experts,
    stop_of,
)
from graphwright.ops import moe_routing, quantized_embedding, quantized_linear
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.rounding import Quantized
from graphwright.scheme import FormatName, LayerOptions, ScaleType, Scheme


@dataclass(frozen=True)
class Layer:
    """A linear layer that is to be quantized: the call, its weight [N, K] and the scheme."""

    node: fx.Node
    weight: fx.Node
    scheme: Scheme
    head: bool

    @property
    def name(self) -> str:
        """Name of the weight."""
        return str(self.weight.target)


class Solved(Protocol):
    """A weight in the form in which it is stored."""

    def dense(self) -> Tensor:
        """The weight [N, K] that it stands for, float32."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        ...


class WeightQuantizer(Pass):
    """Base of the methods that map a weight, and perhaps statistics of its inputs, to codes."""

    kind = "approximate"
    replaces_weights = True
    requires = ("linear",)
    after: ClassVar[tuple[str, ...]] = (
        "merged_linear",
        "float_dtype",
        "folded",
        "experts",
        "fewer_experts",
        "narrower_experts",
        "fewer_active_experts",
        "expert_capacity",
        "expert_choice",
        "shared_experts_fused",
        "pruned",
        "fewer_layers",
        "low_rank",
        "sparse",
    )
    provides: ClassVar[tuple[str, ...]] = ("quantized",)
    conflicts: ClassVar[tuple[str, ...]] = ("quantized",)
    calibrated: ClassVar[bool] = False
    """Whether `solve` wants statistics of a layer's inputs."""
    error_of: ClassVar[Literal["weights", "outputs"]] = "weights"
    """What `error` is the relative error of."""

    group_size: int = Field(64, ge=-1, description="weights that share a scale along the input; 0: the whole row")
    scale_dtype: ScaleType = Field("float16", description="dtype of the scales")
    head_bits: Literal[0, 4, 8] = Field(8, description="bits of the vocabulary head, per row; 0 keeps it")
    embedding_bits: Literal[0, 8] = Field(8, description="bits of the token embedding, per row; 0 keeps it")
    layers: dict[str, LayerOptions] = Field({}, description="changes for layers whose weight matches a pattern")
    keep_first: int = Field(0, ge=0, description="linear layers at the start that stay in floating point")
    keep_last: int = Field(0, ge=0, description="linear layers before the head that stay in floating point")
    expert_tokens: int = Field(
        128, ge=0, description="calibrated: an expert with fewer tokens is rounded on those of all experts of its layer"
    )

    @field_validator("layers")
    @classmethod
    def _patterns(cls, value: dict[str, LayerOptions]) -> dict[str, LayerOptions]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    def model_post_init(self, _context: Any) -> None:
        """Refuses options that make no scheme when the recipe is read, not hours later."""
        for options in (LayerOptions(), *self.layers.values()):
            options.apply(self.scheme())

    def scheme(self) -> Scheme:
        """The scheme of a layer that no pattern names."""
        raise NotImplementedError(f"pass {self.name} defines no scheme")

    @property
    def calibrates(self) -> bool:
        """A calibrated method always does."""
        return self.calibrated

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Those of its schemes, of the head and of the embedding."""
        schemes = [options.apply(self.scheme()) for options in (LayerOptions(), *self.layers.values())]
        found = [scheme.format for scheme in schemes if scheme is not None]
        found += [integer_format(bits) for bits in (self.head_bits, self.embedding_bits) if bits]
        return tuple(dict.fromkeys(found))

    def choose(self, program: Program, context: Context, layers: list[Layer]) -> tuple[list[Layer], dict[str, Any]]:
        """The layers with the schemes that they shall have in the end, and notes on the choice for the report."""
        return layers, {}

    def collector(self) -> Collector:
        """A calibrated method's collector for one layer's inputs."""
        raise NotImplementedError(f"pass {self.name} collects nothing")

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Any:
        """Rounds one weight [N, K]; `statistics` is the filled collector, or None where nothing is calibrated.

        Returns:
            A `Solved`: a `Quantized`, unless the method overrides `restore` and `install`.
        """
        raise NotImplementedError(f"pass {self.name} rounds nothing")

    def solve_expert(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Rounds one weight of an expert, which is stored as codes with a grid, whatever `solve` makes of layers."""
        solved: Quantized = self.solve(weight, scheme, statistics)
        return solved

    def restore(self, tensors: dict[str, Tensor], scheme: Scheme, width: int) -> Any:
        """What `solve` returned, from its `tensors` and the number of columns K."""
        return Quantized.restore(tensors, scheme, width)

    def install(self, edit: "Installation", layer: Layer, solved: Any) -> fx.Node:
        """Puts what `solve` returned in the place of a layer; returns the node that takes it."""
        return edit.linear(layer, solved)

    def error(self, weight: Tensor, quantized: Any, statistics: Any) -> float:
        """Relative error of one layer: of its weight, unless a method can tell that of its output."""
        return rounding.relative_weight_error(weight, quantized)

    def compensate(self, editor: Editor, layer: Layer, quantized: Quantized, node: fx.Node) -> None:
        """Adds what a method wants beside `node`, the quantized layer that took the place of `layer`."""

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every linear layer and token embedding that has a scheme.

        Raises:
            PassError: a layer cannot be rounded, a pattern names no layer, or activations are not finite.
        """
        with Editor(program, self.name, context.fuel) as editor:
            edit = Installation(editor, self.restore)
            unmatched = set(self.layers)
            found = self._layers(program, unmatched)
            mixtures = expert_layers(program, lambda name: self._scheme_of(name, False, unmatched))
            self._refuse_unmatched(unmatched, [*found, *(m.up for m in mixtures)])
            layers, notes = self.choose(program, context, found)
            layers = [layer for layer in layers if editor.allow(layer.node)]
            mixtures = [mixture for mixture in mixtures if editor.allow(mixture.node)]
            if self.calibrated:
                inner = [layer for layer in layers if not layer.head]
                notes |= self._walk(program, context, edit, inner, mixtures)
            for count, layer in enumerate(layers):
                if layer.head or not self.calibrated:
                    context.progress(f"{self.name} {layer.name}", count / len(layers))
                    self._install(edit, layer, None)
                    editor.retire(layer.node)
            for mixture in mixtures if not self.calibrated else ():
                self._experts(context, edit, mixture, None)
                editor.retire(mixture.node)
            notes["layer_errors_of"] = self.error_of
            if self.embedding_bits:
                for node, table in structure.embeddings(program):
                    if editor.allow(node):
                        edit.embedding(node, table, _per_row(self.embedding_bits, self.scale_dtype))
                        editor.retire(node)
        return PassResult(program, editor.sites, notes=notes, layer_errors=edit.errors)

    def _experts(
        self, context: Context, edit: "Installation", mixture: ExpertLayer, seen: Routed | None
    ) -> SolvedExperts:
        """Rounds every expert of a layer by itself, on the tokens that were seen, and installs them."""
        calibrated = None if seen is None else (seen, self.collector, self.expert_tokens)
        progress = lambda text: context.progress(f"{self.name} {text}", 0.5)  # noqa: E731
        program = edit.editor.program
        solved = solve_experts(program, mixture, self.solve_expert, self.error, progress, calibrated)
        edit.errors.update(install_experts(edit.editor, mixture, solved))
        return solved

    def _refuse_unmatched(self, unmatched: set[str], known: list[Any]) -> None:
        if unmatched:
            raise PassError(
                f"No layer's weight matches {', '.join(sorted(unmatched))}",
                where=f"option layers of pass {self.name}",
                fix=f"Weights are called {', '.join(layer.name for layer in known[:4])}, …",
            )

    def _layers(self, program: Program, unmatched: set[str]) -> list[Layer]:
        head = structure.head(program)
        found = structure.linears(program)
        inner = [node for node, _ in found if node is not head]
        kept = {*inner[: self.keep_first], *inner[max(0, len(inner) - self.keep_last) :]}
        layers = []
        for node, weight in found:
            if any(user.target is moe_routing.target for user in node.users):
                continue  # A small error of a router's logits is another expert.
            scheme = self._scheme_of(str(weight.target), node is head, unmatched)
            if scheme is not None and node not in kept:
                layers.append(Layer(node, weight, scheme, node is head))
        return layers

    def _scheme_of(self, name: str, is_head: bool, unmatched: set[str]) -> Scheme | None:
        scheme: Scheme | None = self.scheme()
        if is_head:
            scheme = _per_row(self.head_bits, self.scale_dtype) if self.head_bits else None
        for pattern, options in self.layers.items():
            if re.search(pattern, name):
                unmatched.discard(pattern)
                scheme = options.apply(scheme or self.scheme())
        return scheme

    def _walk(
        self,
        program: Program,
        context: Context,
        edit: "Installation",
        layers: list[Layer],
        mixtures: list[ExpertLayer],
    ) -> dict[str, Any]:
        """Solves layers in the order in which data reaches them, each behind the quantized ones before it."""
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        stages: list[tuple[Stop, list[Layer] | ExpertLayer]] = [
            (Stop(node, f"{self.name} {group[0].name}"), group) for node, group in calibration.by_input(program, layers)
        ]
        stages += [(stop_of(mixture, order, f"{self.name} {mixture.up.name}"), mixture) for mixture in mixtures]
        stages.sort(key=lambda stage: order[stage[0].node])
        batches = calibration.samples(program, context)
        edit.checkpoint = Checkpoint.of(self, program, batches, context)
        pooled: dict[str, list[int]] = {}

        def visit(index: int, collected: Any) -> dict[fx.Node, Weights]:
            work = stages[index][1]
            if isinstance(work, ExpertLayer):
                solved = self._experts(context, edit, work, collected)
                pooled[work.up.name] = solved.pooled
                return {work.node: solved.dense()}
            return {layer.node: self._install(edit, layer, collected).dense() for layer in work}

        def known(index: int) -> bool:
            work = stages[index][1]
            return not isinstance(work, ExpertLayer) and all(edit.known(layer) for layer in work)

        stops = [stop for stop, _ in stages]
        calibration.walk(program, batches, stops, self.collector, visit, context.progress, known)
        rare = {name: found for name, found in pooled.items() if found}
        return {"experts_rounded_on_tokens_of_all": rare} if mixtures else {}

    def _install(self, edit: "Installation", layer: Layer, statistics: Any) -> Solved:
        """Solves a layer, unless another one that reads the same weight is solved, and puts it in the graph."""
        done = edit.find(layer)
        if done is None:
            weight = edit.editor.program.weight(layer.weight)
            try:
                if layer.head:
                    done = rounding.quantize(weight, layer.scheme)
                    error = rounding.relative_weight_error(weight, done)
                else:
                    done = self.solve(weight, layer.scheme, statistics)
                    error = self.error(weight, done, statistics)
            except PassError as reason:
                raise PassError(reason.problem, where=reason.where or layer.name, fix=reason.fix) from reason
            edit.keep(layer, done, error)
        if layer.head:
            edit.linear(layer, done)
        else:
            self.compensate(edit.editor, layer, done, self.install(edit, layer, done))
        return done


class IntegerQuantizer(WeightQuantizer):
    """Base of the methods that round to integer codes."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    symmetric: bool = Field(False, description="no zero points")
    mixed_bits: float | None = Field(None, gt=0, description="mean bits per weight to spend as layers need them")
    mixed_error: float | None = Field(
        None, gt=0, description="error to spend on few bits: root mean square over layers of their outputs' errors"
    )
    mixed_widths: tuple[Literal[2, 3, 4, 8], ...] = Field((2, 3, 4, 8), min_length=1, description="widths to mix")

    def scheme(self) -> Scheme:
        """From the pass's own options."""
        return Scheme(
            format=integer_format(self.bits),
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
        )

    @property
    def calibrates(self) -> bool:
        """A calibrated method does, and any that mixes widths."""
        return self.calibrated or self._mixes

    @property
    def _mixes(self) -> bool:
        return self.mixed_bits is not None or self.mixed_error is not None

    def model_post_init(self, context: Any) -> None:
        """Refuses two budgets."""
        super().model_post_init(context)
        if self.mixed_bits is not None and self.mixed_error is not None:
            raise ValueError("mixed_bits and mixed_error are two budgets: give one")

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Those of all widths that may be mixed too."""
        mixed = map(integer_format, self.mixed_widths) if self._mixes else ()
        return tuple(dict.fromkeys((*super().weight_formats, *mixed)))

    def choose(self, program: Program, context: Context, layers: list[Layer]) -> tuple[list[Layer], dict[str, Any]]:
        """With a budget of mean bits or of error, gives each layer but the head the width that it needs most.

        The loss of a layer at a width is the relative squared error of its output when it alone is rounded to
        nearest, measured on the calibration data; the choice is exact. Layers that share a weight are one.
        """
        if not self._mixes:
            return layers, {}
        mixed = {layer.name: layer for layer in layers if not layer.head}
        widths = sorted(self.mixed_widths)
        options = self._measured(program, context, list(mixed.values()), widths)
        weights = sum(layer.weight.meta["val"].numel() for layer in mixed.values())
        points = allocation.frontier([options[name] for name in mixed])
        if self.mixed_bits is not None:
            chosen = allocation.within(points, int(self.mixed_bits * weights / 8))
        else:
            chosen = allocation.reaching(points, (self.mixed_error or 0.0) ** 2 * len(mixed))
        bits = {name: widths[index] for name, index in zip(mixed, chosen.chosen, strict=True)}
        step = max(1, len(points) // FRONTIER_POINTS)
        ends = [*points[:-1:step], points[-1]]
        drawn = [[point.bytes * 8 / weights, point.loss / len(mixed)] for point in (*ends, chosen)]
        changed = [
            layer if layer.head else replace(layer, scheme=_with_bits(layer.scheme, bits[layer.name]))
            for layer in layers
        ]
        return changed, {"bits": bits, "frontier": drawn[:-1], "chosen": drawn[-1]}

    def _measured(
        self, program: Program, context: Context, layers: list[Layer], widths: list[int]
    ) -> dict[str, list[allocation.Option]]:
        """Bytes and loss of every layer at every width, by weight name."""
        stages = calibration.by_input(program, layers)

        def losses(index: int, collected: calibration.Hessian) -> dict[str, Tensor]:
            return {
                layer.name: torch.tensor(
                    [_loss(program.weight(layer.weight), _with_bits(layer.scheme, bits), collected) for bits in widths],
                    dtype=torch.float64,
                )
                for layer in stages[index][1]
            }

        stops = [Stop(node, f"{self.name} sensitivity {group[0].name}") for node, group in stages]
        found: dict[str, list[allocation.Option]] = {}
        for part in calibration.measure(self, program, context, stops, calibration.Hessian, losses):
            for layer in layers:
                if layer.name in part:
                    sizes = [_with_bits(layer.scheme, bits).bytes(*layer.weight.meta["val"].shape) for bits in widths]
                    options = zip(sizes, part[layer.name].tolist(), strict=True)
                    found[layer.name] = [allocation.Option(size, loss) for size, loss in options]
        return found


def _loss(weight: Tensor, scheme: Scheme, collected: calibration.Hessian) -> float:
    return rounding.output_error(weight, rounding.nearest(weight, scheme), collected.matrix) ** 2


FRONTIER_POINTS = 100
"""At most about so many points of a frontier are kept for the report."""


def _with_bits(scheme: Scheme, bits: int) -> Scheme:
    return LayerOptions(format=integer_format(bits)).apply(scheme) or scheme


def integer_format(bits: int) -> FormatName:
    """`int4` for 4."""
    names: dict[int, FormatName] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
    return names[bits]


def _per_row(bits: int, scale_dtype: ScaleType) -> Scheme:
    return Scheme(format=integer_format(bits), group_size=0, symmetric=True, scale_dtype=scale_dtype)


@dataclass
class Installation:
    """The edit in progress; a weight that several nodes read is quantized once per scheme."""

    editor: Editor
    restore: Callable[[dict[str, Tensor], Scheme, int], Any]
    errors: dict[str, float] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    _names: dict[tuple[str, Scheme], tuple[str | None, ...]] = field(default_factory=dict)
    _results: dict[tuple[str, Scheme], Any] = field(default_factory=dict)

    def known(self, layer: Layer) -> bool:
        """Whether the layer's weight need not be solved."""
        stored = self.checkpoint is not None and not layer.head and self.checkpoint.has(layer.name)
        return stored or (layer.name, layer.scheme) in self._results

    def find(self, layer: Layer) -> Any:
        """What was solved for the layer's weight before, in this run or in the one that was interrupted."""
        key = (layer.name, layer.scheme)
        if key not in self._results and self.checkpoint is not None and self.known(layer):
            tensors, self.errors[layer.name] = self.checkpoint.load(layer.name), self.checkpoint.error(layer.name)
            self._results[key] = self.restore(tensors, layer.scheme, layer.weight.meta["val"].shape[1])
        return self._results.get(key)

    def keep(self, layer: Layer, solved: Solved, error: float) -> None:
        """Notes what was solved."""
        self._results[(layer.name, layer.scheme)] = solved
        self.errors[layer.name] = error
        if self.checkpoint is not None and not layer.head:
            self.checkpoint.save(layer.name, solved.tensors(), error=error)

    def linear(self, layer: Layer, quantized: Quantized) -> fx.Node:
        """Puts a quantized linear layer in the place of a plain one, and returns it."""
        node, scheme = layer.node, layer.scheme
        packed = self._nodes(node, layer.name, quantized)
        bias = node.args[2] if len(node.args) > 2 else None
        rest = (*packed, bias, scheme.format, quantized.group_size)
        new = self.editor.call(quantized_linear, node.args[0], *rest, before=node)
        self.editor.replace(node, new, layer.name)
        return new

    def embedding(self, node: fx.Node, table: fx.Node, scheme: Scheme) -> None:
        """Puts a quantized embedding in the place of a plain one."""
        name, value = str(table.target), table.meta["val"]
        done = self._results.get((name, scheme))
        if done is None:
            weight = self.editor.program.weight(name)
            done = self._results[(name, scheme)] = rounding.quantize(weight, scheme)
            self.errors[name] = rounding.relative_weight_error(weight, done)
        shape = (scheme.format, done.group_size, done.width, value.dtype)
        packed = self._nodes(node, name, done)
        new = self.editor.call(quantized_embedding, node.args[1], *packed, *shape, before=node)
        self.editor.replace(node, new, name)

    def _nodes(self, before: fx.Node, name: str, quantized: Quantized) -> tuple[fx.Node | None, ...]:
        """Nodes that read the packed weight, its scales and its zero points or None."""
        grid, format = quantized.grid, quantized.scheme.format
        stored = {format: quantized.packed, "scale": grid.scale, "zero_point": grid.zero_point}
        return self.read(name, quantized.scheme, stored, before)

    def read(
        self, name: str, scheme: Scheme, stored: Mapping[str, Tensor | None], before: fx.Node
    ) -> tuple[fx.Node | None, ...]:
        """Nodes that read tensors of a weight; what is stored already under its name and scheme is shared."""
        key = (name, scheme)
        if key in self._names:
            return tuple(None if known is None else self.editor.read(known, before) for known in self._names[key])
        made = tuple(
            None if tensor is None else self.editor.weight(f"{name}_{part}", tensor, before)
            for part, tensor in stored.items()
        )
        self._names[key] = tuple(None if node is None else str(node.target) for node in made)
        return made
