"""The Inductor backend: programs become AOTInductor libraries for the CPU.

Stages of `compile`, in order:

1. cut the graph into a prologue, one region per repeated layer, and an epilogue      (regions.py, subgraph.py)
2. lower each region, for one token of one sequence and for any number                (lowerings.py, linear.py, …)
3. export and compile it; weights and caches stay outside, as inputs                  (build.py)
4. write the schedule that strings the regions together, and run it                   (executable.py)
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from graphwright.backend import Executable, Progress, Support
from graphwright.backends.inductor.build import Job, build
from graphwright.backends.inductor.executable import InductorExecutable, Schedule, library_name
from graphwright.backends.inductor.lowerings import Form, lowering
from graphwright.backends.inductor.regions import plan_regions
from graphwright.backends.inductor.support import support
from graphwright.contract import Contract
from graphwright.errors import BackendError
from graphwright.op import OPS
from graphwright.ops import fetch_experts
from graphwright.program import Program
from graphwright.target import Target
from graphwright.text import symbol_names

SCHEDULE = "schedule.json"

SINGLE = {"batch": 1, "sequence": 1, "logits": 1}
"""What is fixed in the decode form."""


class InductorBackend:
    """Compiles for the CPU of the machine it runs on."""

    name = "inductor"
    kinds = ("cpu",)

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether Inductor generates code for the node; what a library or ATen computes is a fallback."""
        return support(node)

    def prepare(self, program: Program, target: Target) -> Program:
        """The program as it is: regions read weights in the core's layout."""
        return program

    def compile(self, program: Program, target: Target, directory: Path, progress: Progress) -> Executable:
        """Compiles every region in every form that the program is called in.

        Raises:
            BackendError: no C++ compiler, or a region that Inductor refuses.
        """
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise BackendError("The inductor backend needs a C++ compiler and found none", fix="Install g++ or clang++")
        if next(program.calls(fetch_experts.target), None) is not None:
            raise BackendError(
                "The inductor backend cannot leave experts in a file",
                fix="Compile with the tvm backend, or leave the pass offload_experts out of the recipe",
            )
        plan = plan_regions(program)
        names = symbol_names(program.graph, program.contract)
        forms: tuple[Form, ...] = ("decode", "general") if program.contract.state else ("general",)
        present = {dim.name for dim in program.contract.dims}
        jobs = [
            Job(
                region,
                form,
                {name: size for name, size in SINGLE.items() if form == "decode" and name in present},
                names,
                directory / library_name(form, region.name),
            )
            for form in forms
            for region in plan.regions
        ]
        build(jobs, program.contract, progress)
        schedule = Schedule.of(plan, forms)
        (directory / SCHEDULE).write_text(json.dumps(schedule.to_json()))
        return InductorExecutable(schedule, program.contract, program.weights(), directory)

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from compiled files."""
        schedule = Schedule.from_json(json.loads((directory / SCHEDULE).read_text()))
        return InductorExecutable(schedule, contract, weights, directory)

    def jit(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """A callable over the contract's inputs in order, compiled in this process, for the torch.compile face."""
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        fakes = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
        table = {**select_decomp_table(), **{op.target: lowering(op.target, "general") for op in OPS.values()}}
        # Rows are sorted by expert, which is known only at run time; those ops are called as they are.
        for name in ("experts", "grouped_linear", "quantized_experts"):
            table.pop(OPS[name].target)
        compiled = compile_fx(program.module, fakes, decompositions=table)
        return lambda arguments: compiled(*arguments)


BACKEND = InductorBackend()
