"""Experts in a mapped file, of which some are in memory: least lately used ones are let go when a budget is full.

    store = ExpertStore([[up tiles, down tiles], …], [8, …], budget=64 << 20)
    store.fetch(layer, chosen, guessed)        before the kernels of a layer read its experts
    store.hits / (store.hits + store.misses)

Kernels read weights where they are mapped; the store advises the operating system which pages will be needed and which
are not. What it lets go is read again from the file when it is touched, so that a mistake costs time and nothing else.
"""

import ctypes
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graphwright import ops
from graphwright.backends.tvm.expert_layout import PARTS, tiled_experts
from graphwright.errors import ArtifactError, BackendError
from graphwright.match import arguments
from graphwright.program import Program

PLAN = "experts.json"

FETCH = "graphwright.fetch_experts"
"""Start of the names of the functions that a library calls, one for each layer."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class MappedFile:
    """A part of a file in memory."""

    start: int
    end: int
    offset: int
    path: str


class ExpertStore:
    """Keeps the experts of all layers within a budget.

    Args:
        stacks: of each layer, tensors that hold the same part for each of its experts, one behind the other.
        counts: experts of each layer.
        budget: bytes.

    Attributes:
        hits: choices of an expert that was in memory.
        misses: choices of one that was not.
        guessed: experts that were asked for because of a guess.
        resident_bytes: what is in memory, by this account.
        drop_cached: also drop the operating system's copy of what is let go, as on a machine whose memory is full.

    Raises:
        ArtifactError: a tensor is not mapped from a file.
    """

    def __init__(self, stacks: Sequence[Sequence[Tensor]], counts: Sequence[int], budget: int) -> None:
        self.budget = budget
        self.hits = self.misses = self.guessed = self.resident_bytes = 0
        self.drop_cached = False
        self._counts = list(counts)
        self._stacks = [
            [(t.data_ptr(), t.nbytes // count) for t in tensors] for tensors, count in zip(stacks, counts, strict=True)
        ]
        self._bytes = [sum(size for _, size in layer) for layer in self._stacks]
        self._used: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._ran: int | None = None
        maps = _mappings()
        for start, size in (stack for layer in self._stacks for stack in layer):
            if not any(one.start <= start and start + size <= one.end for one in maps):
                raise ArtifactError(
                    "Weights of experts are not mapped from a file, so they cannot be left there",
                    fix="Load the artifact from a local disk, with the weights as they were saved",
                )
        self._maps = [one for one in maps if any(one.start <= s < one.end for layer in self._stacks for s, _ in layer)]
        for layer, count in enumerate(self._counts):
            for expert in range(count):
                self._advise(layer, expert, mmap.MADV_DONTNEED)

    @property
    def total_bytes(self) -> int:
        """Of all experts."""
        return sum(count * size for count, size in zip(self._counts, self._bytes, strict=True))

    @property
    def hit_rate(self) -> float:
        """Choices that found their expert in memory."""
        return self.hits / max(self.hits + self.misses, 1)

    def fetch(self, layer: int, chosen: Iterable[int], guess: Iterable[int] = ()) -> None:
        """Asks for experts of a layer that will be read now, and for those of the next one that may be."""
        if self._ran is not None:
            self._trim(self._ran)
        self._ran = layer
        wanted = {(layer, expert) for expert in chosen if expert >= 0}
        missing = [one for one in sorted(wanted) if one not in self._used]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        for one in wanted:
            if one in self._used:
                self._used.move_to_end(one)
        self._admit(missing, wanted)
        likely = {(layer + 1, expert) for expert in guess if expert >= 0}
        early = [one for one in sorted(likely) if one not in self._used]
        room = self.budget - sum(self._bytes[one[0]] for one in wanted | (likely - set(early)))
        fitting = early[: max(0, room // self._bytes[layer + 1])] if early else []
        self.guessed += len(fitting)
        self._admit(fitting, wanted | likely)

    def _admit(self, new: list[tuple[int, int]], kept: set[tuple[int, int]]) -> None:
        """Lets go what was used least lately, but for `kept`, until the new ones fit, and asks for these."""
        needed = sum(self._bytes[layer] for layer, _ in new)
        for one in list(self._used):
            if self.resident_bytes + needed <= self.budget:
                break
            if one not in kept:
                del self._used[one]
                self.resident_bytes -= self._bytes[one[0]]
                self._advise(*one, mmap.MADV_DONTNEED)
        for one in new:
            self._used[one] = None
            self._advise(*one, mmap.MADV_WILLNEED)
        self.resident_bytes += needed

    def _trim(self, layer: int) -> None:
        """Lets go what was mapped beside the experts that a layer read: a fault maps up to 2 MB around a page."""
        page, count = mmap.PAGESIZE, self._counts[layer]
        held = [expert for expert in range(count) if (layer, expert) in self._used]
        runs = [(a, b) for a, b in zip([-1, *held], [*held, count], strict=True) if b - a > 1]
        for start, size in self._stacks[layer]:
            for before, behind in runs:
                first = -(-(start + (before + 1) * size) // page) * page
                last = (start + behind * size) // page * page
                if first < last:
                    _libc.madvise(first, last - first, mmap.MADV_DONTNEED)

    def _advise(self, layer: int, expert: int, advice: int) -> None:
        page = mmap.PAGESIZE
        for start, size in self._stacks[layer]:
            # Pages that hold a part of a neighbour go too; what is left of it is read again.
            first = (start + expert * size) // page * page
            last = -(-(start + (expert + 1) * size) // page) * page
            if _libc.madvise(first, last - first, advice):
                raise BackendError(f"madvise failed: {os.strerror(ctypes.get_errno())}")
            if advice == mmap.MADV_DONTNEED and self.drop_cached:
                self._drop(first, last - first)

    def _drop(self, start: int, size: int) -> None:
        one = next(m for m in self._maps if m.start <= start < m.end)
        file = os.open(one.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, one.offset + start - one.start, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _mappings() -> list[MappedFile]:
    """Files that are mapped into this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path:
            start, end = (int(part, 16) for part in span.split("-"))
            found.append(MappedFile(start, end, int(offset, 16), path[0]))
    return found


def write_plan(program: Program, directory: Path) -> int:
    """Writes which weights are fetched, if any are; returns the number of layers.

    Raises:
        BackendError: experts that shall be fetched are not in tiles.
    """
    layers: list[dict[str, Any]] = []
    limits: dict[str, Any] = {}
    for node in program.calls(ops.fetch_experts.target):
        readers = [user for user in node.users if user.target is tiled_experts.target]
        if len(readers) != 1:
            raise BackendError("Experts that are fetched have no tiles, so nothing can be left in the file")
        given = arguments(readers[0])
        parts = [given[name] for name in PARTS if given[name] is not None and not name.endswith("bias")]
        layers.append({"count": given["num_experts"], "weights": [str(part.target) for part in parts]})
        limits = {name: arguments(node)[name] for name in ("share", "budget")}
    if layers:
        (directory / PLAN).write_text(json.dumps({**limits, "layers": layers}))
    return len(layers)


def read_plan(directory: Path) -> dict[str, Any] | None:
    """What `write_plan` wrote, or None."""
    file = directory / PLAN
    return json.loads(file.read_text()) if file.is_file() else None


def open_store(plan: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ExpertStore:
    """The store of a loaded artifact, over the weights as kernels read them."""
    stacks = [[weights[name] for name in layer["weights"]] for layer in plan["layers"]]
    total = sum(tensor.nbytes for layer in stacks for tensor in layer)
    budget = int(plan["budget"] or plan["share"] * total)
    return ExpertStore(stacks, [layer["count"] for layer in plan["layers"]], budget)
