"""What the layouts share that replace the contiguous caches of `static_cache`: where caches are written and read."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.contract import StateSpec
from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import attention, kv_cache_update
from graphwright.pass_ import Pass
from graphwright.program import Program
from graphwright.rewrite import describe, extend_contract

aten = torch.ops.aten


class CacheLayout(Pass):
    """Base of the passes that give caches another layout."""

    requires: ClassVar[tuple[str, ...]] = ("kv_cache",)


@dataclass(frozen=True)
class Cache:
    """One tensor of cache.

    Attributes:
        spec: the state.
        state: its placeholder.
        write: the `kv_cache_update` that fills it.
        read: the slice of it that is read; its slots in use, or a ring's window.
    """

    spec: StateSpec
    state: fx.Node
    write: fx.Node
    read: fx.Node

    @property
    def new(self) -> fx.Node:
        """What is written, [B, Hkv, S, D]."""
        return _argument(self.write, 1)

    @property
    def slots(self) -> fx.Node:
        """Where it is written, [B, S]."""
        return _argument(self.write, 2)

    @property
    def end(self) -> fx.Node | int:
        """How many slots are read."""
        return _argument(self.read, 3)

    @property
    def grows(self) -> bool:
        """Whether it holds the whole text, and is no ring."""
        return "capacity" in self.spec.shape

    @property
    def head_dim(self) -> int:
        """Channels of one entry."""
        return int(self.spec.shape[3])

    @property
    def kv_heads(self) -> int:
        """Heads of one entry."""
        return int(self.spec.shape[1])


def _argument(node: fx.Node, place: int) -> Any:
    return node.args[place]


@dataclass(frozen=True)
class Layer:
    """An attention over two caches that hold the whole text."""

    index: int
    attention: fx.Node
    key: Cache
    value: Cache


def find_caches(program: Program) -> list[Cache]:
    """Every cache that is written by `kv_cache_update` and read as a slice of its first slots.

    Raises:
        PassError: a cache is used in another way.
    """
    specs = {spec.name: spec for spec in program.contract.state}
    found = []
    for write in program.calls(kv_cache_update.target):
        state = write.args[0]
        others = [user for user in state.users if user is not write]
        if len(others) != 1 or others[0].target is not aten.slice.Tensor or others[0].args[1:3] != (2, 0):
            raise PassError("A cache is not read as its first slots, once", where=describe(write))
        found.append(Cache(specs[str(state.target)], state, write, others[0]))
    return found


def find_layers(program: Program, what: str) -> list[Layer]:
    """Attentions whose caches hold the whole text; rings of sliding windows are small, and stay.

    Raises:
        PassError: there is none; `what` names the layout that was asked for.
    """
    reads = {cache.read: cache for cache in find_caches(program)}
    layers: list[Layer] = []
    for node in program.calls(attention.target):
        key, value = reads.get(node.args[1]), reads.get(node.args[2])
        if key is not None and value is not None and key.grows and value.grows:
            layers.append(Layer(len(layers), node, key, value))
    if not layers:
        raise PassError(
            f"No attention of {program.metadata.name} reads key and value caches that hold the whole text, so {what} "
            "has nothing to work on",
            fix="Rings of sliding windows are small already; leave this pass out",
        )
    return layers


def entry_bytes(spec: StateSpec) -> int:
    """Bytes of one token in a cache [B, Hkv, slots, D]."""
    return int(spec.shape[1]) * int(spec.shape[3]) * spec.dtype.itemsize


def drop_unused(program: Program) -> None:
    """Drops the slots in use from the contract where no cache is left whose slots grow."""
    contract = program.contract
    place = next(node for node in program.graph.nodes if node.target == "key_positions")
    if not place.users:
        extend_contract(program, drop=("key_positions",))
        used = {size for spec in (*program.contract.inputs, *program.contract.state) for size in spec.shape}
        program.contract = program.contract.with_(
            dims=tuple(dim for dim in contract.dims if dim.name in used or dim.name not in ("keys", "capacity"))
        )


def require_causal_only(program: Program, layers: list[Layer]) -> None:
    """Refuses attention that is limited besides being causal, which caches of a fixed size do not keep.

    Raises:
        PassError: an attention has chunks, a prefix, or a window within the model's context.
    """
    for layer in layers:
        options = {name: argument(layer.attention, name) for name in ("chunk", "prefix", "window")}
        if options["window"] >= program.metadata.context_length:
            options["window"] = 0
        for name, value in options.items():
            if value:
                raise PassError(f"An attention has a {name} of {value}", where=describe(layer.attention))
