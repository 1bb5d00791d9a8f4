"""The program as torch_tensorrt takes it: ATen, and those of our ops that `converters` has converters for.

    given = Handover(program, torch.device("cuda"))     # runs on its own, and computes what the program computes
    archive = given.exported(tensors, ranges)           # the same as a torch.export program

- Ops made of plain arithmetic (norms, rotary embedding, gates) are traced through their own references.
- Products over codes keep their op, over symmetric weights whose width is that of the codes: what zero points add is a
  small product of its own, and activations rounded per token are divided by their step before, and multiplied after.
- Attention that TensorRT has a kernel for keeps its op, with all that hides keys in one bias.
- Every other op of ours stands for itself and runs in PyTorch.

Nothing is written in place: what the program writes into an input is one more output, for the caller to copy back. Of
state, only what is new leaves, with the slots that it belongs to.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import annotate, preserve_node_meta
from torch.nn import functional

from graphwright import clean, ops, packing
from graphwright.backends.tensorrt.takes import FORMATS, ROUNDED, has_kernel, on_codes, per_token
from graphwright.errors import BackendError
from graphwright.match import argument
from graphwright.op import op_of
from graphwright.ops.attention import default_positions, visible_keys
from graphwright.ops.quantize_dequantize import LARGEST
from graphwright.program import Program, attribute
from graphwright.rewrite import describe

Sizes = tuple[int, int, int]
"""The smallest, the usual and the largest size of a dimension."""

HIDDEN = -6e4
"""Added to the score of a hidden key: finite, so that no query becomes NaN, and within half precision."""

ORIGIN = "graphwright_node"
"""Key of the node of the program that a traced node comes from, in `meta["custom"]`."""

DECOMPOSED = {"attention", "gated_activation", "hadamard_transform", "quantize_dequantize", "rms_norm", "rope"}
"""Ops that are traced through their references where they have no form of their own here."""

MASK = ("query_positions", "key_positions", "bias", "alibi_slopes")
LIMITS = ("causal", "window", "chunk", "prefix", "anchors", "block")


class Handover(nn.Module):
    """Runs a program's graph with every op in the form that is handed over.

    Args:
        program: what to run; its weights are moved to the device.
        device: where inputs lie, and where tensors are made whose place the graph names.

    Raises:
        BackendError: a state is written twice, so that what is new of it is not one tensor.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        super().__init__()
        self.contract = program.contract
        self._program, self._device = program, device
        self._names: dict[str, str] = {}
        """Of each weight, the buffer that holds it."""
        for name, weight in program.weights().items():
            self._hold(name, weight)
        self.entered: dict[str, fx.Node] = {}
        """Of each state that the program writes entries into, the node that does."""
        for node in program.calls(ops.kv_cache_update.target):
            held: Any = node.args[0]
            if any(spec.name == str(held.target) for spec in self.contract.state):
                if str(held.target) in self.entered:
                    raise BackendError(f"State {held.target} is written twice in one part", where=describe(node))
                self.entered[str(held.target)] = node
        changed = clean.written(program.module)
        placeholders = program.graph.find_nodes(op="placeholder")
        self.written = [n.name for n in placeholders if n in changed and str(n.target) not in self.entered]
        """Other inputs that the program writes into; their new values are outputs after the program's own."""
        for node in program.calls(ops.quantized_linear.target, ops.quantized_embedding.target):
            if is_carried(node):
                self._prepare(node)
        self.to(device)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what is returned: `<state>.new` and `<state>.slots` are the last."""
        entries = (f"{name}.{part}" for name in self.entered for part in ("new", "slots"))
        return (*self.contract.outputs, *self.written, *entries)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The program's outputs, the new value of each input that it writes, and what is new of each state."""
        values: dict[fx.Node, Any] = {}
        for node, given in zip(self._program.graph.find_nodes(op="placeholder"), inputs, strict=True):
            values[node] = given.clone() if node.name in self.written else given
        for node in self._program.graph.nodes:
            if node.op == "get_attr":
                values[node] = self._held(str(node.target))
            elif node.op == "call_function":
                with annotate({ORIGIN: node.name}):
                    values[node] = self._call(node, values)
        outputs: Any = self._program.graph.output_node().args[0]
        updates = [value for node, value in values.items() if node.op == "placeholder" and node.name in self.written]
        entries = (tensor for node in self.entered.values() for tensor in values[node])
        return (*(values[node] for node in outputs), *updates, *entries)

    def exported(self, tensors: Sequence[Tensor], ranges: Mapping[str, Sizes]) -> torch.export.ExportedProgram:
        """The module as a torch.export program for the sizes in `ranges`, by the contract's names of dimensions.

        Args:
            tensors: inputs in the contract's order, of sizes above one where a dimension is to stay free.
            ranges: dimensions that are not here have the size that `tensors` have.
        """
        dynamic = tuple(
            {
                axis: torch.export.Dim.AUTO(min=ranges[dim][0], max=ranges[dim][2])
                for axis, dim in enumerate(spec.shape)
                if isinstance(dim, str) and dim in ranges
            }
            for spec in (*self.contract.inputs, *self.contract.state)
        )
        with torch.no_grad(), preserve_node_meta():
            archive = torch.export.export(self, tuple(tensors), dynamic_shapes=(dynamic,), strict=False)
            return archive.run_decompositions({torch.ops.aten._safe_softmax.default: safe_softmax})

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        form = FORMS.get(node.target)
        if form is not None:
            return form(self, node, values)
        op = op_of(node.target)
        if op is not None and op.name in DECOMPOSED:
            return op.reference(*args, **kwargs)
        if any(
            one.name == "device" and one.kwarg_only
            for one in getattr(getattr(node.target, "_schema", None), "arguments", ())
        ):
            kwargs = {**kwargs, "device": self._device}
        return node.target(*args, **kwargs)

    # What forms use

    def weight(self, name: str) -> Tensor | None:
        """A tensor that `_prepare` made, or None."""
        return self._held(name) if name in self._names else None

    def _hold(self, name: str, tensor: Tensor) -> None:
        self._names[name] = f"weight_{len(self._names)}"
        self.register_buffer(self._names[name], tensor.detach(), persistent=True)

    def _held(self, name: str) -> Tensor:
        return attribute(self, self._names[name])

    def _prepare(self, node: fx.Node) -> None:
        """What zero points add to each group, [N, G]: kept beside the codes where it is not nothing."""
        name = added_name(node)
        if argument(node, "zero_point") is None or name in self._names:
            return
        scale, zero = (self._program.weight(argument(node, part)).float() for part in ("scale", "zero_point"))
        points = zero - packing.FORMATS[argument(node, "format")].zero
        if points.any():
            self._hold(name, -points * scale)


def is_carried(node: fx.Node) -> bool:
    """Whether TensorRT has a form for the low-bit weight of a node: a constant in one of its formats."""
    constant = all(
        part is None or part.op == "get_attr" for part in (argument(node, n) for n in ("weight", "scale", "zero_point"))
    )
    return constant and argument(node, "format") in FORMATS


def added_name(node: fx.Node) -> str:
    """The name of what zero points add to a weight."""
    return f"{argument(node, 'weight').target}.added"


def quantized_linear(to: Handover, node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    """A product over codes alone, with what zero points, steps of activations and the bias add around it."""
    given: Any = node.args[0]
    weight, scale, zero, bias = (_value(node, n, values) for n in ("weight", "scale", "zero_point", "bias"))
    format, group_size = argument(node, "format"), int(argument(node, "group_size"))
    if not is_carried(node):
        made: Tensor = ops.quantized_linear(values[given], weight, scale, zero, bias, format, group_size)
        return made
    x, step = values[given], None
    if on_codes(node):
        x, step = x if isinstance(x, tuple) else rounded(values[given.args[0]], format)
    width = scale.shape[1] * group_size
    if width != x.shape[-1]:
        # Codes stay whole, so that the weight stays quantized: the activations grow instead.
        x = functional.pad(x, (0, width - x.shape[-1]))
    product = ops.quantized_linear(x, weight, scale, None, None, format, group_size)
    added = to.weight(added_name(node))
    if added is not None:
        sums = x.unflatten(-1, (scale.shape[1], group_size)).sum(-1)
        product = product + functional.linear(sums, added.to(x.dtype))
    if step is not None:
        product = product * step
    return product if bias is None else product + bias


def quantized_embedding(to: Handover, node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    """Rows of the symmetric table, and what zero points add to their groups."""
    indices = values[node.args[0]]
    weight, scale, zero = (_value(node, n, values) for n in ("weight", "scale", "zero_point"))
    format, group_size = argument(node, "format"), int(argument(node, "group_size"))
    wanted, dtype = int(argument(node, "embedding_dim")), argument(node, "dtype")
    if not is_carried(node):
        made: Tensor = ops.quantized_embedding(indices, weight, scale, zero, format, group_size, wanted, dtype)
        return made
    width = scale.shape[1] * group_size
    rows: Tensor = ops.quantized_embedding(indices, weight, scale, None, format, group_size, width, dtype)
    added = to.weight(added_name(node))
    if added is not None:
        cut = rows.unflatten(-1, (scale.shape[1], group_size))
        rows = (cut + functional.embedding(indices, added.to(dtype)).unsqueeze(-1)).flatten(-2)
    return rows if wanted == width else rows[..., :wanted]


def quantize_dequantize(to: Handover, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Codes and their step for the products that read them; codes times the step for everybody else."""
    x, format = values[node.args[0]], argument(node, "format")
    if per_token(node):
        codes, step = rounded(x, format)
        return (codes, step) if all(map(_is_product, node.users)) else codes * step
    scale = _value(node, "scale", values)
    if scale is not None and format in ROUNDED:
        return ops.quantize_dequantize(x, scale, format, 0)
    return ops.quantize_dequantize.reference(x, scale, format, argument(node, "group_size"))


def rounded(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes as numbers, and the step [..., 1] that they are multiples of, in the dtype of the activations."""
    wide = x.float()
    step = (wide.abs().amax(-1, keepdim=True) / LARGEST[format]).clamp_min(1e-30)
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return ops.quantize_dequantize((wide / step).to(x.dtype), one, format, 0), step.to(x.dtype)


def attention(to: Handover, node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    """Attention with one bias in the dtype of the query, where there is a kernel; else the reference."""
    query, key, value = (values[node.args[i]] for i in range(3))
    scale = float(argument(node, "scale"))
    given = {name: _value(node, name, values) for name in (*MASK, *LIMITS)}
    if not has_kernel(node):
        rest = {name: _value(node, name, values) for name in ("sinks", "softcap")}
        made: Tensor = ops.attention.reference(query, key, value, scale=scale, **given, **rest)
        return made
    at = [default_positions(given[name], like) for name, like in (("query_positions", query), ("key_positions", key))]
    seen = visible_keys(*at, **{name: given[name] for name in LIMITS})[:, None]
    bias = torch.where(seen, 0.0, HIDDEN)
    if given["alibi_slopes"] is not None:
        distance = (at[1][:, None, :] - at[0][:, :, None]).float()
        bias = bias + given["alibi_slopes"].float()[None, :, None, None] * distance[:, None]
    if given["bias"] is not None:
        bias = bias + given["bias"].float()
        seen = seen & (given["bias"] != float("-inf"))
    narrow = bias.clamp_min(HIDDEN).to(query.dtype)
    result: Tensor = ops.attention(query, key, value, None, None, narrow, None, None, scale, False)
    if all(given[name] is None for name in MASK[:3]) and not (given["window"] or given["chunk"]):
        return result  # the first key is seen by every query
    return torch.where(seen.any(-1, keepdim=True), result, 0.0)


def kv_cache_update(to: Handover, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The new entries and their slots; later nodes see the cache with them. Padding goes to the scratch slot."""
    held: Any = node.args[0]
    cache, new, slots = (values[argument] for argument in node.args[:3])
    if str(held.target) not in to.entered:
        return node.target(cache, new, slots)
    index = torch.where(slots < 0, cache.shape[2] - 1, slots)[:, None, :, None].expand_as(new)
    values[held] = cache.scatter(2, index, new.to(cache.dtype))
    return new, slots


def safe_softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax with zeros for a row that is hidden whole, in operators that torch_tensorrt has converters for."""
    seen = scores.amax(dim, keepdim=True) > float("-inf")
    return torch.where(seen, torch.where(seen, scores, 0.0).softmax(dim, dtype=dtype), 0.0)


def _value(node: fx.Node, name: str, values: Mapping[fx.Node, Any]) -> Any:
    found = argument(node, name)
    return values[found] if isinstance(found, fx.Node) else found


def _is_product(node: fx.Node) -> bool:
    return on_codes(node) and is_carried(node)


Form = Callable[[Handover, fx.Node, dict[fx.Node, Any]], Any]

FORMS: Mapping[Any, Form] = {
    ops.attention.target: attention,
    ops.kv_cache_update.target: kv_cache_update,
    ops.quantize_dequantize.target: quantize_dequantize,
    ops.quantized_embedding.target: quantized_embedding,
    ops.quantized_linear.target: quantized_linear,
}
"""Ops that keep a form of their own."""
