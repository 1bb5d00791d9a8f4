"""The TVM backend: programs become one library of hand-written integer kernels for the CPU.

Stages of `compile`, in order:

1. quantized weights are cut into the tiles that kernels stream; the program keeps them so        (layout.py)
2. chains of nodes that one kernel computes are found                                             (fusion.py)
3. on demand, schedules of kernels are picked by measurement                                      (tuning.py)
4. the graph is translated into a Relax function per form, with kernels from kernels/tir          (translate.py)
5. LLVM compiles the module for the target's features, and it is linked into a shared library     (build.py)

An artifact runs without the compiler (executable.py): methods that need TVM's compiler import it themselves, because
its library is fifty times larger than the runtime and takes longer to import than an artifact takes to load.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from graphwright.backend import Executable, Progress, Support
from graphwright.backends.tvm.executable import TvmExecutable
from graphwright.backends.tvm.expert_store import read_plan, write_plan
from graphwright.backends.tvm.layout import tile_weights
from graphwright.contract import Contract
from graphwright.errors import BackendError
from graphwright.program import Program
from graphwright.target import Target, host

LIBRARY = "program.so"


class TvmBackend:
    """Compiles for CPUs; with `tuning` seconds, schedules of kernels are picked by measurement first."""

    name = "tvm"
    kinds = ("cpu",)

    def __init__(self, tuning: float = 0.0) -> None:
        self._tuning = tuning

    def tuned(self, seconds: float) -> "TvmBackend":
        """The backend that measures for that long before it compiles."""
        return TvmBackend(seconds)

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether a node becomes a kernel of this backend, or what stands in the way."""
        from graphwright.backends.tvm.support import support

        return support(node)

    def prepare(self, program: Program, target: Target) -> Program:
        """The program with its weights in tiles."""
        return tile_weights(program)

    def compile(self, program: Program, target: Target, directory: Path, progress: Progress) -> Executable:
        """Compiles both forms of a prepared program into one library.

        Raises:
            BackendError: a node that this backend cannot translate, or no C compiler to link with.
        """
        from graphwright.backends.tvm.build import build, forms
        from graphwright.backends.tvm.tuning import save, tune

        found = tune(program, target, self._tuning, progress) if self._tuning else []
        if found:
            save(found, directory)
        build(program, target, directory / LIBRARY, progress, {one.layer: one.schedule for one in found})
        write_plan(program, directory)
        plan = read_plan(directory)
        return TvmExecutable(directory / LIBRARY, forms(program), program.contract, program.weights(), plan)

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from the compiled library."""
        names = ("decode", "general") if contract.state else ("general",)
        return TvmExecutable(directory / LIBRARY, names, contract, weights, read_plan(directory), mapped=True)

    def kernels(self, directory: Path) -> list[dict[str, Any]]:
        """One row for every kernel whose schedule was tuned.

        Raises:
            BackendError: none was.
        """
        from graphwright.backends.tvm.tuning import load

        found = load(directory)
        if not found:
            raise BackendError(
                "All kernels of this artifact have the default schedules", fix="Compile with --tune SECONDS"
            )
        return [
            {
                "layer": f"{one.layer.outputs} x {one.layer.inputs} {one.layer.format}",
                "calls": one.calls,
                **asdict(one.schedule),
                "ms": round(one.milliseconds, 3),
                "default ms": round(one.default_milliseconds, 3),
            }
            for one in found
        ]

    def jit(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """A callable over the contract's inputs in order, compiled in this process."""
        workspace = tempfile.TemporaryDirectory(prefix="graphwright-tvm-")
        prepared = tile_weights(program)
        run = self.compile(prepared, host(), Path(workspace.name), lambda _text, _fraction: None)
        names = program.contract.names
        return lambda arguments: run(dict(zip(names, arguments, strict=True)))


BACKEND = TvmBackend()
