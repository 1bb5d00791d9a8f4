"""What a backend is: it says which nodes it can lower for a target, and turns a program into something that runs.

A backend is a sub-package of `graphwright.backends` with a `BACKEND`; its name is the package's. `compile` writes
every file that a fresh process needs into a directory and returns the executable; `load` makes the same executable
from those files and the program's weights, without the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx

from graphwright import registry
from graphwright.contract import Contract
from graphwright.errors import BackendError
from graphwright.program import Program
from graphwright.target import Target
from graphwright.text import op_name

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of the whole that is finished."""


@dataclass(frozen=True)
class Support:
    """Whether a node is lowered to the backend's own code, and if not, what happens instead."""

    ok: bool
    reason: str = ""


class Executable(Protocol):
    """A compiled program. Inputs and state by name; state is written in place."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs it once."""
        ...


@runtime_checkable
class SamplingExecutable(Protocol):
    """An executable that chooses tokens where its logits lie, so that these need not travel."""

    def resident(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs it once, and leaves the outputs where they were made."""
        ...

    def sample(
        self, logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> Tensor:
        """What `graphwright.ops.sample_tokens` does, for such outputs and numbers on the CPU; tokens on the CPU."""
        ...


class Backend(Protocol):
    """Lowers programs for some kinds of target."""

    name: str
    kinds: tuple[str, ...]

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether `node` becomes the backend's own code on `target`."""
        ...

    def prepare(self, program: Program, target: Target) -> Program:
        """The program with weights in the layout of the backend's kernels, which is what an artifact stores.

        May change `program` itself. It still runs anywhere: ops over other layouts have references of their own.
        """
        ...

    def compile(self, program: Program, target: Target, directory: Path, progress: Progress) -> Executable:
        """Compiles `program`, writing what `load` needs into the existing `directory`.

        Raises:
            BackendError: the program cannot be lowered; the node and the reason are named.
        """
        ...

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from the files in `directory` and the weights by name, which are shared, not copied."""
        ...


@runtime_checkable
class JustInTimeBackend(Protocol):
    """A backend that also compiles in this process, for the torch.compile face."""

    def jit(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """A callable over the contract's inputs in order."""
        ...


@runtime_checkable
class RequiringJitBackend(Protocol):
    """A backend that compiles in this process with packages and on machines that it does not need ahead of time."""

    def require_jit(self, target: Target | None = None) -> None:
        """Refuses to serve torch.compile, on this machine at all or for a target.

        Raises:
            BackendError: a package or the machine is missing; says what to install, and what to do instead.
            TargetError: the target is not the machine at hand.
        """
        ...


@runtime_checkable
class PartialCallable(Protocol):
    """What `jit` returned, where it learns by compiling which nodes stay in PyTorch."""

    left: dict[str, str]
    """The nodes that stayed out, by name, each with the reason."""


@runtime_checkable
class TunableBackend(Protocol):
    """A backend that can pick the schedules of its kernels by measuring them on this machine."""

    def tuned(self, seconds: float) -> Backend:
        """The same backend, which measures for that long before it compiles."""
        ...


@runtime_checkable
class KernelLister(Protocol):
    """A backend that can say what its compiled kernels are made of."""

    def kernels(self, directory: Path) -> list[dict[str, Any]]:
        """One row for every kernel in an artifact's directory of compiled files."""
        ...


@runtime_checkable
class RequiringBackend(Protocol):
    """A backend that is imported without packages that it compiles with."""

    def require(self, target: Target) -> None:
        """Refuses to begin.

        Raises:
            BackendError: a package is missing; says what to install.
            TargetError: the packages that are there do not compile for the target.
        """
        ...


@runtime_checkable
class PartialBackend(Protocol):
    """A backend that learns while it compiles which nodes it does not take, and leaves them to PyTorch."""

    def left(self, directory: Path, target: Target) -> dict[str, str]:
        """The nodes that stayed out of what was compiled into `directory`, by name, each with the reason."""
        ...


@runtime_checkable
class BuilderNamer(Protocol):
    """A backend that has several ways to build its code."""

    def builder(self, directory: Path, target: Target) -> str:
        """What built the code for a target in a directory of compiled files, with versions."""
        ...


@dataclass(frozen=True)
class Coverage:
    """How much of a program a backend lowers itself; the rest falls back, and is listed with reasons."""

    lowered: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Every node that fell back, by name, with the reason; where the backend learns it by compiling."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Why backends that the target prefers were not used, by name."""
    builder: str = ""
    """What built the backend's own code, where the backend has several ways."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        return vars(self).copy()


def coverage(program: Program, backend: Backend, target: Target, directory: Path | None = None) -> Coverage:
    """Asks the backend about every call of the program and counts the answers by op.

    With the directory of the compiled files, what compiling has shown counts too.
    """
    left = backend.left(directory, target) if directory and isinstance(backend, PartialBackend) else {}
    builder = backend.builder(directory, target) if directory and isinstance(backend, BuilderNamer) else ""
    found = Coverage(left=left, builder=builder)
    for node in program.calls():
        support = Support(False, left[node.name]) if node.name in left else backend.supports(node, target)
        name = op_name(node.target)
        counts = found.lowered if support.ok else found.fallbacks
        counts[name] = counts.get(name, 0) + 1
        if not support.ok:
            found.reasons[name] = support.reason
    return found


def region_coverage(program: Program, backend: Backend, target: Target, left: Mapping[str, str] | None) -> Coverage:
    """What `coverage` says of a program compiled in this process; `left` is what compiling has shown, if anything."""
    if left is None:
        return coverage(program, backend, target)
    found = Coverage(left=dict(left))
    for node in program.calls():
        counts = found.fallbacks if node.name in left else found.lowered
        name = op_name(node.target)
        counts[name] = counts.get(name, 0) + 1
        if node.name in left:
            found.reasons[name] = left[node.name]
    return found


def choose(program: Program, target: Target, candidates: Sequence[Backend]) -> tuple[Backend, dict[str, str]]:
    """The first backend that lowers every call itself, else the last; and why the ones before it were passed over."""
    passed_over: dict[str, str] = {}
    for backend in candidates[:-1]:
        reasons = coverage(program, backend, target).reasons
        if not reasons:
            return backend, passed_over
        name, reason = next(iter(reasons.items()))
        passed_over[backend.name] = f"{name}: {reason}"
    return candidates[-1], passed_over


def tuned(backend: Backend, seconds: float) -> Backend:
    """A backend that measures for `seconds` before it compiles; itself for 0.

    Raises:
        BackendError: it has nothing to tune.
    """
    if not seconds:
        return backend
    if not isinstance(backend, TunableBackend):
        raise BackendError(f"Backend {backend.name} has no schedules to tune", fix="Leave tuning out")
    return backend.tuned(seconds)


def backends_for(target: Target, name: str = "", *, jit: bool = False) -> list[Backend]:
    """The backend called `name`, or those of the target that are installed, the preferred one first.

    With `jit`, they are to compile in this process.

    Raises:
        BackendError: there is none for this kind of target, or it is not installed.
    """
    if name:
        return [required_backend(target, name, jit=jit)]
    last = required_backend(target, jit=jit)
    return [*filter(None, map(_installed, target.backends[:-1])), last]


def required_backend(target: Target, name: str = "", *, jit: bool = False) -> Backend:
    """The backend called `name`, or the one that the target falls back to.

    Whether a compile can end well is known from it before the work begins, without importing the backends that are
    preferred but optional: their libraries take memory that the work needs.

    Raises:
        BackendError: there is none for this kind of target, or it is not installed.
    """
    if not (name or target.backends):
        raise BackendError(
            f"No backend of this version compiles for {target.name}", fix="Compile for cpu, which runs everywhere"
        )
    backend = registry.backend(name or target.backends[-1])
    if target.kind not in backend.kinds:
        raise BackendError(
            f"Backend {name} compiles for {', '.join(backend.kinds)}, and {target.name} is {target.kind}"
        )
    if jit and isinstance(backend, RequiringJitBackend):
        backend.require_jit(target)
    elif isinstance(backend, RequiringBackend):
        backend.require(target)
    return backend


def _installed(name: str) -> Backend | None:
    try:
        return registry.backend(name)
    except BackendError:
        return None
