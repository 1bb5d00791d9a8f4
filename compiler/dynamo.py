"""The torch.compile face: `torch.compile(model, backend="graphwright", options={"recipe": "int8"})`.

Dynamo hands over one graph per region of the model, between graph breaks, and calls the result with the arguments of
that region. The graph is brought to ATen, raised and rewritten like a captured program; passes that would change what
the region is called with (cache insertion, chosen logits) are left out, since the model brings its own cache.

A backend that is named takes what it has kernels for; the target's last backend takes the rest of the region, and a
warning lists every node that was left to it, with the reason.

With `options={"backend": "tensorrt"}` the region goes through torch_tensorrt to this machine's GPU. `coverage` in the
options is called with what became the backend's own code of each region, and what did not and why.

Weights are taken as they are when the region is compiled, as `torch._inductor` does when it freezes: change a weight
afterwards and call `torch._dynamo.reset()`. Gradients are not computed.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from graphwright import clean, registry, shapes
from graphwright.backend import (
    Backend,
    Coverage,
    JustInTimeBackend,
    PartialCallable,
    RequiringJitBackend,
    backends_for,
    choose,
    region_coverage,
    required_backend,
)
from graphwright.capture import finish
from graphwright.contract import Contract, Dim, InputSpec
from graphwright.errors import BackendError, RecipeError, TargetError, nearest
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.program import Metadata, Program, attribute
from graphwright.recipe import Recipe
from graphwright.serialize import set_attribute
from graphwright.split import compile_parts
from graphwright.target import Target, local_gpu

aten = torch.ops.aten

CHANGES_CONTRACT = {"kv_cache", "selected_logits"}
"""Properties whose passes change what a program is called with."""


class Options(BaseModel):
    """What `torch.compile(..., options={...})` may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    recipe: Any = "none"
    target: str = ""
    """Empty: what the backend is for on this machine; the CPU where none is named."""
    backend: str = ""
    verify: bool = True
    coverage: Callable[[Coverage], Any] | None = None


def graphwright_backend(
    module: fx.GraphModule, _example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compiles one dynamo graph.

    Raises:
        RecipeError: an option, recipe or pass is unknown.
        TargetError: the target is unknown, or the backend is for GPUs that this machine has none of.
        BackendError: the backend is unknown, or does not compile for the target.
    """
    chosen = _options(options or {})
    recipe = _keeping_contract(Recipe.load(chosen.recipe))
    named = registry.backend(chosen.backend) if chosen.backend else None
    if isinstance(named, RequiringJitBackend):
        named.require_jit()
    target = Target.parse(chosen.target) if chosen.target else _this_machine(named)
    backends = backends_for(target, chosen.backend, jit=True)
    return _Region(module, recipe, target, backends, chosen)


def _options(given: Mapping[str, Any]) -> Options:
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"Option {name!r} of torch.compile: {first['msg']}", fix=nearest(name, Options.model_fields)
        ) from error


def _this_machine(named: Backend | None) -> Target:
    """What `named` is for on this machine; the CPU where none is named."""
    if named is None or "cpu" in named.kinds:
        return Target.parse("cpu")
    gpu = local_gpu()
    if gpu is not None and gpu.partition(":")[0] in named.kinds:
        return Target.parse(gpu)
    if "tensorrt" in named.kinds:
        return Target.parse("tensorrt")
    raise TargetError(
        f"Backend {named.name} compiles for {', '.join(named.kinds)}, and this machine has no such GPU",
        fix="Leave the backend out to compile for the CPU, or compile ahead of time: graphwright compile --target",
    )


def _keeping_contract(recipe: Recipe) -> Recipe:
    kept = tuple(p for p in recipe.passes if not CHANGES_CONTRACT & set(p.provides))
    return recipe.model_copy(update={"passes": kept})


class _Region:
    """One dynamo graph: compiled once per set of the Python numbers that dynamo hands over as scalar tensors."""

    def __init__(
        self, module: fx.GraphModule, recipe: Recipe, target: Target, backends: Sequence[Backend], options: Options
    ) -> None:
        self.module = module
        self.recipe = recipe
        self.target = target
        self.backends = backends
        self.options = options
        self.placeholders = module.graph.find_nodes(op="placeholder")
        self.scalars = [i for i, node in enumerate(self.placeholders) if _is_number(node)]
        self._variants: dict[tuple[float, ...], Callable[..., Any]] = {}
        self._last: tuple[Program, Backend, Callable[[], dict[str, str] | None]] | None = None
        """What was compiled last, and what says which of its nodes were left out, until its coverage is told."""
        self._warned = False

    def __call__(self, *arguments: Any) -> Any:
        """Runs the variant for these numbers, compiling it at the first call."""
        if torch.is_grad_enabled() and not self._warned and any(_wants_grad(a) for a in arguments):
            self._warned = True
            warnings.warn("graphwright compiles for inference: the outputs carry no gradient", stacklevel=2)
        numbers = tuple(float(arguments[i]) for i in self.scalars)
        with torch.no_grad():
            if numbers in self._variants:
                return self._variants[numbers](arguments)
            self._variants[numbers] = self.compile(arguments)
            outputs = self._variants[numbers](arguments)
        # After the first run: some backends learn only then what they do not take.
        if self.options.coverage is not None and self._last is not None:
            program, backend, left = self._last
            self.options.coverage(region_coverage(program, backend, self.target, left()))
            self._last = None
        return outputs

    def compile(self, arguments: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        """Brings the graph to ATen, rewrites it and lowers it; weights are bound to the tensors given.

        Raises:
            BackendError: the target is the CPU and the tensors lie elsewhere, or the backend refuses the region.
        """
        elsewhere = {a.device.type for a in arguments if isinstance(a, Tensor)} - {"cpu"}
        if elsewhere and self.target.kind == "cpu":
            raise BackendError(
                f"The target is the CPU, and tensors of the region lie on {', '.join(sorted(elsewhere))}",
                fix="Move the model to the CPU, or name the target, as in options={'backend': 'tensorrt'}",
            )
        flat = _to_aten(self.module, arguments)
        if flat is None:
            return lambda args: self.module(*args)
        bound = _bind_weights(flat, self.placeholders, arguments)
        if elsewhere:
            to_cpu(flat)
        kept = [i for i, node in enumerate(self.placeholders) if str(node.target) not in bound]
        program = _program(flat)
        kept = [i for i in kept if str(self.placeholders[i].target) in program.contract.names]
        context = Context(self.target)
        manager = PassManager(context, self.recipe.budget, verify=self.options.verify and not _writes_inputs(flat))
        rewritten = manager.run(program, plan_passes(self.recipe, program))
        run = self._lowered(rewritten)
        names = {str(node.target) for node in clean.written(rewritten.module) if node.op == "placeholder"}
        return _Densely(run, kept, [str(self.placeholders[i].target) in names for i in kept])

    def _lowered(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """The program compiled by the backend of choice, and by the target's last one where that leaves nodes out."""
        lowering, _ = choose(program, self.target, self.backends)
        last = required_backend(self.target, jit=True)
        if lowering.name == last.name or not isinstance(last, JustInTimeBackend):
            if not isinstance(lowering, JustInTimeBackend):
                raise BackendError(
                    f"Backend {lowering.name} compiles ahead of time only", fix="Use graphwright.compile"
                )
            whole = lowering.jit(program)
            self._last = (program, lowering, lambda: whole.left if isinstance(whole, PartialCallable) else None)
            return whole
        run, left = compile_parts(program, self.target, lowering, last)
        self._last = (program, lowering, lambda: left)
        if left:
            calls = sum(isinstance(node.meta.get("val"), Tensor) for node in program.calls())
            warnings.warn(
                f"graphwright: backend {lowering.name} leaves {len(left)} of {calls} nodes of this region to "
                f"{last.name}: {_by_reason(left)}",
                stacklevel=2,
            )
        return run


def _by_reason(left: Mapping[str, str]) -> str:
    """Every node that was left out, those with the same reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(nodes)}: {reason}" for reason, nodes in names.items())


class _Densely:
    """Calls compiled code with contiguous arguments, as it was compiled for, and copies back what it wrote."""

    def __init__(self, run: Callable[[Sequence[Any]], Any], kept: Sequence[int], written: Sequence[bool]) -> None:
        self._run = run
        self._kept = kept
        self._written = written

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """Runs the region."""
        given = [arguments[i] for i in self._kept]
        dense = [value.contiguous() for value in given]
        outputs = self._run(dense)
        for written, value, copy in zip(self._written, given, dense, strict=True):
            if written and copy is not value and copy.data_ptr() != value.data_ptr():
                value.copy_(copy)
        return outputs


def _is_number(node: fx.Node) -> bool:
    """A Python float or int that dynamo wrapped in a scalar tensor, only to call `item` on it."""
    value = node.meta.get("example_value")
    return (
        isinstance(value, Tensor)
        and value.dim() == 0
        and bool(node.users)
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _to_aten(module: fx.GraphModule, arguments: Sequence[Any]) -> fx.GraphModule | None:
    """The graph in pre-dispatch ATen over fake tensors; None for a region without tensors to compute on."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = fx.GraphModule(module, graph)
    values = []
    for node, source, argument in zip(
        graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder"), arguments, strict=True
    ):
        if _is_number(source):
            for user in list(node.users):
                user.replace_all_uses_with(float(argument))
                graph.erase_node(user)
        values.append(source.meta["example_value"])
    copied.recompile()
    mode = detect_fake_mode(values)
    if mode is None:
        return None
    with mode, torch.no_grad():
        traced = make_fx(copied, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    for node, source in zip(
        traced.graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder"), strict=True
    ):
        node.target = node.name = str(source.target)
    return traced


def to_cpu(module: fx.GraphModule) -> None:
    """Weights and new tensors on the CPU, where programs are rewritten and checked; `jit` moves them back."""
    cpu = torch.device("cpu")
    for node in module.graph.nodes:
        if node.op == "get_attr":
            set_attribute(module, str(node.target), attribute(module, str(node.target)).to(cpu))
        elif node.op == "call_function":
            place = partial(fx.node.map_aggregate, fn=lambda a: cpu if isinstance(a, torch.device) else a)
            node.args, node.kwargs = place(node.args), place(node.kwargs)
    module.recompile()


def _bind_weights(flat: fx.GraphModule, placeholders: Sequence[fx.Node], arguments: Sequence[Any]) -> set[str]:
    """Turns parameters and buffers among the placeholders into weights of the graph; returns their names."""
    bound = set()
    nodes = {str(node.target): node for node in flat.graph.find_nodes(op="placeholder")}
    for source, argument in zip(placeholders, arguments, strict=True):
        is_weight = isinstance(argument, nn.Parameter) or hasattr(argument, "_dynamo_static_input_type")
        if not is_weight or not isinstance(argument, Tensor):
            continue
        name, node = str(source.target), nodes[str(source.target)]
        set_attribute(flat, name, argument.detach())
        with flat.graph.inserting_after(node):
            weight = flat.graph.create_node("get_attr", name)
        weight.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(weight)
        flat.graph.erase_node(node)
        bound.add(name)
    return bound


def _program(flat: fx.GraphModule) -> Program:
    """A program over the remaining tensor inputs; free sizes are read off the tensors that have them."""
    graph = flat.graph
    placeholders = graph.find_nodes(op="placeholder")
    tensors = [node for node in placeholders if isinstance(node.meta["val"], Tensor)]
    holders = {
        str(size): (node, axis)
        for node in reversed(tensors)
        for axis, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in placeholders:
        if node in tensors:
            continue
        if node.users:
            if str(node.meta["val"]) not in holders:
                raise BackendError(
                    f"The region takes the number {node.target}, which is no size of any of its tensors",
                    fix="Mark it static: torch._dynamo.config.specialize_int = True, or dynamic=False",
                )
            holder, axis = holders[str(node.meta["val"])]
            with graph.inserting_before(first):
                size = graph.call_function(aten.sym_size.int, (holder, axis))
            size.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(size)
        graph.erase_node(node)
    specs: list[InputSpec] = []
    dims: dict[str, Dim] = {}
    for node in tensors:
        shape = tuple(_size(size, dims) for size in node.meta["val"].shape)
        specs.append(InputSpec(str(node.target), node.meta["val"].dtype, shape))
    output = graph.output_node()
    names = tuple(f"output_{i}" for i in range(len(output.args[0])))
    contract = Contract(tuple(specs), names, tuple(dims.values()))
    # Symbols of our own: dynamo's also stand for Python floats, which are constants here.
    shapes.propagate(flat, contract)
    return finish(flat, contract, Metadata("dynamo region"))


def _size(size: Any, dims: dict[str, Dim]) -> int | str:
    """A number, or the name of a dimension; tracing may have found that a symbol is a number after all."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    if not isinstance(size, torch.SymInt) or expression.is_number:
        return int(expression)
    return dims.setdefault(str(expression), Dim(f"dim_{len(dims)}")).name


def _writes_inputs(flat: fx.GraphModule) -> bool:
    """Whether the region writes into its arguments, as a static cache does; running it twice would differ."""
    return bool(clean.written(flat))
