"""From a program to one ONNX graph: each semantic op and each ATen op that is left has a short translation.

    model = Translator(program, options).model()

Translations are found by the node's target, those of the profile first. A translation is called with the node's
arguments, tensors as `onnx_ir` values; one that looks at weights or at other nodes takes the node itself. Values carry
the dtype and the symbolic shape of the program's node, so both are known wherever the program has a name for a tensor.

Sizes are int64 vectors of one element, which is what shapes are put together from.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from graphwright.backends.onnx.builder import DTYPES, Builder
from graphwright.backends.onnx.naming import DIMS, dim_name, tensor_name
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.contract import dtype_name
from graphwright.errors import BackendError
from graphwright.program import Program
from graphwright.rewrite import describe
from graphwright.text import op_name, symbol_names

Translation = Callable[..., Any]
"""Called with the translator and the node's arguments; returns a value, or a tuple of them."""


class RefusalError(BackendError):
    """A node that has no form in the profile; `node` is its name."""

    def __init__(self, problem: str, node: fx.Node, fix: str = "") -> None:
        super().__init__(problem, where=describe(node), fix=fix)
        self.node = node.name


@dataclass(frozen=True)
class OfNode:
    """A translation that takes the node itself, as (translator, node)."""

    write: Translation


class Translator:
    """Writes one program as one graph.

    Args:
        program: its caches are inputs and outputs; state in place only where the profile has a form for it.
        options: profile and opset.
        tables: translations by target; the first table that has one is used.
    """

    def __init__(
        self, program: Program, options: OnnxOptions, tables: Sequence[Mapping[Any, Translation | OfNode]]
    ) -> None:
        self.program, self.options = program, options
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = {}
        self.extra_outputs: list[ir.Value] = []
        """What translations hand out besides the program's own outputs."""
        self.shared: dict[Any, Any] = {}
        """What several nodes need and one computes: masks, rotary tables; by any key."""
        self.node: fx.Node = program.graph.output_node()
        """The node that is being translated."""
        self._tables = tables
        self._symbols = symbol_names(program.graph, program.contract)

    def model(self) -> ir.Model:
        """The whole program.

        Raises:
            BackendError: a node that this profile has no translation for.
        """
        inputs = [self._input(node) for node in self.program.graph.nodes if node.op == "placeholder"]
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._call(node)
        outputs = [self._output(node, name) for node, name in self._outputs()]
        outputs += self.extra_outputs
        graph = self.builder.graph(self.program.metadata.name, inputs, outputs, self.options.opset)
        return ir.Model(graph, ir_version=self.options.ir_version, producer_name="graphwright")

    # What translations use

    def value(self, argument: Any) -> Any:
        """An argument as translations see it: nodes as their values, weights as initializers."""
        if isinstance(argument, fx.Node):
            if argument.op == "get_attr" and argument not in self.values:
                self.values[argument] = self.builder.weight(str(argument.target), self.program.weight(argument))
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return [self.value(item) for item in argument]
        return argument

    def tensor(self, node: fx.Node | None) -> Tensor | None:
        """The weight that a node reads, or None for None.

        Raises:
            BackendError: the node computes it.
        """
        if node is None:
            return None
        if node.op != "get_attr":
            raise BackendError("The weight of a quantized layer is not a constant", where=describe(self.node))
        return self.program.weight(node)

    def typed(self, value: ir.Value, like: Any) -> ir.Value:
        """`value` with the dtype and shape of a fake tensor."""
        return self.shaped(value, onnx_dtype(like.dtype), like.shape)

    def shaped(self, value: ir.Value, dtype: ir.DataType | None, sizes: Sequence[Any]) -> ir.Value:
        """`value` with a dtype and a shape, where no shape inference can find them."""
        value.type = None if dtype is None else ir.TensorType(dtype)
        value.shape = ir.Shape([dim_name(size, self._symbols) for size in sizes])
        return value

    def size(self, size: Any) -> ir.Value:
        """A size as a vector of one int64."""
        return self.builder.ints([size]) if isinstance(size, int) else size

    def vector(self, sizes: Sequence[Any]) -> ir.Value:
        """Sizes as one int64 vector, constant where all of them are."""
        if all(isinstance(size, int) for size in sizes):
            return self.builder.ints(sizes)
        return self.builder("Concat", *map(self.size, sizes), axis=0)

    def shared_value(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` writes, written once per key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def refuse(self, problem: str, fix: str = "") -> RefusalError:
        """The error for the node at hand."""
        return RefusalError(problem, self.node, fix)

    # The walk

    def _input(self, node: fx.Node) -> ir.Value:
        made = self.typed(ir.Value(name=tensor_name(str(node.target))), node.meta["val"])
        contract = self.program.contract
        spec = next(one for one in (*contract.inputs, *contract.state) if one.name == str(node.target))
        made.shape = ir.Shape([DIMS.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape])
        self.values[node] = made
        return made

    def _outputs(self) -> list[tuple[fx.Node, str]]:
        nodes = self.program.graph.output_node().args[0]
        return list(zip(nodes, map(tensor_name, self.program.contract.outputs), strict=True))

    def _output(self, node: fx.Node, name: str) -> ir.Value:
        value = self.values[node]
        if value.is_graph_input() or value.is_initializer() or value.name in {n for _, n in self._outputs()}:
            value = self.typed(self.builder("Identity", value), node.meta["val"])
        value.name = name
        return value

    def _call(self, node: fx.Node) -> None:
        if node in self.values:
            return  # written together with an earlier node
        self.node = node
        self.builder.scope = node.name
        translation = next((table[node.target] for table in self._tables if node.target in table), None)
        if translation is None:
            raise self.refuse(
                f"Profile {self.options.profile} of the ONNX export has no translation for {op_name(node.target)}"
            )
        try:
            made = self._translated(translation, node)
        except RefusalError:
            raise
        except BackendError as error:
            raise RefusalError(error.problem, node, error.fix) from error
        self.values[node] = self._with_types(made, node.meta["val"])

    def _translated(self, translation: Translation | OfNode, node: fx.Node) -> Any:
        if isinstance(translation, OfNode):
            return translation.write(self, node)
        arguments = {key: self.value(item) for key, item in node.kwargs.items()}
        return translation(self, *(self.value(item) for item in node.args), **arguments)

    def _with_types(self, made: Any, fake: Any) -> Any:
        if made is None:
            return None
        if isinstance(fake, Tensor):
            if made.is_graph_input() or made.is_initializer():
                return made
            return self.typed(made, fake)
        if isinstance(fake, (list, tuple)):
            return tuple(self._with_types(one, like) for one, like in zip(made, fake, strict=True))
        return made


def item(_translator: Translator, values: Sequence[Any], index: int) -> Any:
    """`values[index]`."""
    return values[index]


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """ONNX's dtype.

    Raises:
        BackendError: it has none.
    """
    if dtype not in DTYPES:
        raise BackendError(f"ONNX has no type for {dtype_name(dtype)}")
    return DTYPES[dtype]


SIZES: Mapping[Any, Translation] = {
    operator.getitem: item,
    operator.add: lambda t, a, b: t.builder("Add", t.size(a), t.size(b)),
    operator.sub: lambda t, a, b: t.builder("Sub", t.size(a), t.size(b)),
    operator.mul: lambda t, a, b: t.builder("Mul", t.size(a), t.size(b)),
    operator.floordiv: lambda t, a, b: t.builder("Div", t.size(a), t.size(b)),
}
"""Arithmetic on sizes, which are not negative, and choosing one of several results."""
