"""Which launches a lowered program can make: its calls are tried on meta tensors of every class of sizes.

A kernel's machine code depends on a size only through classes, such as one row, up to 16, up to 64, more. The sizes
below lie on both sides of every border that a kernel file draws.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphwright.backends.triton.ops import OPS
from graphwright.contract import Contract
from graphwright.errors import BackendError
from graphwright.kernels.triton import sampling
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import Launch, Recorder, meta
from graphwright.program import Program
from graphwright.rewrite import describe
from graphwright.text import symbol_names

LENGTHS = (1, 2, 4, 16, 17, 64, 65, 256, 520, 2048, 8192, 32768)
BATCHES = (1, 2, 8, 17, 65)
SIZES = {"batch": BATCHES, "capacity": (2,), "key_groups": (2,), "blocks": (2,), "table": (64,)}
"""Sizes tried per dimension; every other dimension takes a length. No kernel depends on the room that a cache has."""


def launches(program: Program, device: Device) -> list[Launch]:
    """One launch for every problem that a call of the program can pose, the one with the most blocks.

    Raises:
        BackendError: a call that no kernel serves in some size, or whose sizes do not follow from the contract.
    """
    by_text = symbol_names(program.graph, program.contract)
    found: dict[str, Launch] = {}
    known: set[Any] = set()
    seen: set[Any] = set()
    for node in program.calls(*OPS):
        # The layers of a model make the same calls.
        call = _symbolic(node)
        if call in known:
            continue
        known.add(call)
        free = sorted(_free(node, by_text))
        for sizes in _situations(program.contract, free):
            arguments = _arguments(node, by_text, sizes)
            mark = (node.target, _signature(arguments))
            if mark in seen:
                continue
            seen.add(mark)
            for launch in _record(node, arguments, device):
                key = launch.problem().key
                if key not in found or _blocks(launch) > _blocks(found[key]):
                    found[key] = launch
    return list(found.values())


def sampling_launches(program: Program, device: Device) -> list[Launch]:
    """Launches that choose tokens from the logits of a program with caches; none for other programs.

    A repetition penalty makes logits float32, so there are kernels for that as well.
    """
    (output,) = program.graph.find_nodes(op="output")
    if not program.contract.state or program.contract.outputs[:1] != ("logits",):
        return []
    logits = output.args[0][0].meta["val"]
    recorder = Recorder(device)
    for dtype in dict.fromkeys((logits.dtype, torch.float32)):
        for temperature in (0.0, 1.0):
            shape = meta(dtype, max(BATCHES), int(logits.shape[-1]))
            sampling.sample_tokens(recorder, shape, meta(torch.float64, max(BATCHES)), temperature, 1, 0.5, 0.0)
    return recorder.launches


def _record(node: fx.Node, arguments: Any, device: Device) -> list[Launch]:
    recorder = Recorder(device)
    args, kwargs = arguments
    try:
        OPS[node.target].launch(recorder, *args, **kwargs)
    except BackendError as error:
        raise BackendError(error.problem, where=describe(node), fix=error.fix) from error
    return recorder.launches


def _situations(contract: Contract, names: list[str]) -> Iterator[dict[str, int]]:
    choices = []
    for name in names:
        dim = contract.dim(name)
        sizes = [size for size in SIZES.get(name, LENGTHS) if dim.min <= size <= dim.max]
        choices.append(dict.fromkeys([*sizes, min(max(dim.min, LENGTHS[-1]), dim.max)]))
    for combination in itertools.product(*choices):
        yield dict(zip(names, combination, strict=True))


def _free(node: fx.Node, names: Mapping[str, str]) -> set[str]:
    """The contract's dimensions that the arguments of a call depend on."""
    found: set[str] = set()
    for source in node.all_input_nodes:
        for expression in _expressions(source.meta["val"]):
            for symbol in expression.free_symbols:
                if str(symbol) not in names:
                    raise BackendError(f"The size {symbol} does not follow from the inputs", where=describe(source))
                found.add(names[str(symbol)])
    return found


def _expressions(value: Any) -> list[sympy.Expr]:
    if isinstance(value, Tensor):
        return [_expression(size) for size in (*value.shape, *value.stride())]
    return [_expression(value)] if isinstance(value, torch.SymInt) else []


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _arguments(node: fx.Node, names: Mapping[str, str], sizes: Mapping[str, int]) -> Any:
    def number(size: Any) -> int:
        expression = _expression(size)
        symbols = sorted(expression.free_symbols, key=str)
        return _evaluated(expression, tuple((symbol, sizes[names[str(symbol)]]) for symbol in symbols))

    def concrete(source: fx.Node) -> Any:
        value = source.meta["val"]
        if isinstance(value, Tensor):
            shape, stride = map(number, value.shape), map(number, value.stride())
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=value.dtype, device="meta")
        return number(value) if isinstance(value, torch.SymInt) else value

    return fx.node.map_arg((node.args, dict(node.kwargs)), concrete)


@functools.lru_cache(maxsize=1 << 16)
def _evaluated(expression: sympy.Expr, sizes: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    return int(expression.subs(sizes))


def _symbolic(node: fx.Node) -> Any:
    """The call with every tensor as its symbolic shape and dtype, as text."""
    args, kwargs = fx.node.map_arg(
        (node.args, dict(node.kwargs)), lambda n: (_expressions(n.meta["val"]), getattr(n.meta["val"], "dtype", None))
    )
    return f"{node.target} {args} {kwargs}"


def _signature(arguments: Any) -> Any:
    flat, _ = torch.utils._pytree.tree_flatten(arguments)
    return tuple((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in flat)


def _blocks(launch: Launch) -> int:
    blocks = 1
    for size in launch.grid(launch.configs[0]):
        blocks *= size
    return blocks
