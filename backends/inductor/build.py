"""Regions become libraries: trace with torch.export, compile with AOTInductor, several processes at once."""

import functools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from graphwright.backend import Progress
from graphwright.backends.inductor.lowerings import Form, Lowered
from graphwright.backends.inductor.subgraph import Region
from graphwright.contract import Contract
from graphwright.contract import Dim as ContractDim
from graphwright.errors import BackendError

HINTS = {"batch": 2, "sequence": 96, "keys": 160, "capacity": 1024, "logits": 3}
"""Sizes that Inductor's heuristics see; any others work."""

OPTIONS: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.check_lowerbound": False,
}
"""Multiply and add may become one instruction; the rest only makes compiling faster."""


@dataclass(frozen=True)
class Job:
    """One library to build.

    Attributes:
        region: what to compile.
        form: how ops are lowered.
        fixed: sizes of the symbolic dimensions that are constants in this library.
        names: the contract's dimension by shape symbol.
        file: where the library goes.
    """

    region: Region
    form: Form
    fixed: Mapping[str, int]
    names: Mapping[str, str]
    file: Path


def build(jobs: Sequence[Job], contract: Contract, progress: Progress) -> None:
    """Builds all libraries.

    Raises:
        BackendError: naming the node that cannot be traced or compiled.
    """
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        try:
            _build_in_processes(jobs, contract, progress, workers)
            return
        except BrokenProcessPool:
            pass  # A worker was killed, most likely for want of memory: one at a time needs less.
    for number, job in enumerate(jobs):
        progress(f"compile {job.file.stem}", number / len(jobs))
        build_one(job, contract, torch.get_num_threads())


_inherited: tuple[Sequence[Job], Contract, int] | None = None
"""What forked workers work on; graphs and fake tensors are inherited, not pickled."""


def _build_in_processes(jobs: Sequence[Job], contract: Contract, progress: Progress, workers: int) -> None:
    global _inherited
    _inherited = (jobs, contract, torch.get_num_threads())
    _warm_up()
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            running = {pool.submit(_work, number): jobs[number] for number in range(len(jobs))}
            for done, future in enumerate(as_completed(running)):
                future.result()
                progress(f"compiled {running[future].file.stem}", (done + 1) / len(jobs))
    finally:
        _inherited = None


@functools.cache
def _warm_up() -> None:
    """Imports what every worker needs before they are forked."""
    import torch._inductor.compile_fx
    import torch._inductor.lowering
    import torch._inductor.package
    import torch.export  # noqa: F401


def _start_worker() -> None:
    # The parent's OpenMP threads do not exist here; one thread never asks for them.
    torch.set_num_threads(1)


def _work(number: int) -> None:
    if _inherited is not None:
        jobs, contract, threads = _inherited
        build_one(jobs[number], contract, threads)


def build_one(job: Job, contract: Contract, threads: int) -> None:
    """Traces and compiles one region."""
    from torch._inductor import aoti_compile_and_package

    module = Lowered(job.region.graph, job.form)
    examples, shapes = _examples(job, contract)
    try:
        with torch.no_grad():
            exported = torch.export.export(module, examples, dynamic_shapes={"inputs": shapes}, strict=False)
    except Exception as error:
        raise BackendError(
            f"Region {job.file.stem} cannot be traced: {_first_line(error)}",
            where=module.at,
            fix="Leave out the pass that made this node, or compile with another backend",
        ) from error
    try:
        options = {**OPTIONS, "cpp.threads": threads, "compile_threads": 1}
        aoti_compile_and_package(exported, package_path=str(job.file), inductor_configs=options)
    except Exception as error:
        raise BackendError(
            f"Inductor cannot compile region {job.file.stem}: {_first_line(error)}",
            fix="Check that a C++ compiler is installed (`graphwright doctor`)",
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _examples(job: Job, contract: Contract) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Tensors to trace with, and which of their sizes stay symbolic."""
    dims = {name: _dim(contract.dim(name), job.fixed) for name in set(job.names.values())}
    sizes = {name: _hint(contract.dim(name), job.fixed) for name in dims}
    tensors, shapes = [], []
    for value in job.region.values:
        concrete: list[int] = []
        symbolic: dict[int, Any] = {}
        for axis, size in enumerate(value.shape):
            concrete.append(_size(size, job.names, sizes))
            dynamic = _size(size, job.names, dims) if isinstance(size, torch.SymInt) else size
            if not isinstance(dynamic, int):
                symbolic[axis] = dynamic
        tensors.append(torch.zeros(concrete, dtype=value.dtype, device="cpu"))
        shapes.append(symbolic or None)
    return tuple(tensors), tuple(shapes)


def _dim(dim: ContractDim, fixed: Mapping[str, int]) -> Any:
    if dim.name in fixed or dim.min == dim.max:
        return fixed.get(dim.name, dim.min)
    return torch.export.Dim(dim.name, min=dim.min, max=dim.max)


def _hint(dim: ContractDim, fixed: Mapping[str, int]) -> int:
    return fixed.get(dim.name, max(dim.min, min(HINTS.get(dim.name, 5), dim.max)))


def _size(size: Any, names: Mapping[str, str], values: Mapping[str, Any]) -> Any:
    """A size with numbers, or export's dimensions, in place of its symbols."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        return int(expression)
    found = [values[names[str(symbol)]] for symbol in symbols]
    if all(isinstance(value, int) for value in found):
        return int(expression.subs(dict(zip(symbols, found, strict=True))))
    if expression.is_Symbol:
        return found[0]
    slope, constant = sympy.Poly(expression, *symbols).coeff_monomial(symbols[0]), expression.subs(symbols[0], 0)
    if len(symbols) > 1 or expression != slope * symbols[0] + constant:
        return torch.export.Dim.AUTO
    scaled = found[0] if slope == 1 else int(slope) * found[0]
    return scaled + int(constant) if constant else scaled
