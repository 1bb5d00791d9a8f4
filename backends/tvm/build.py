"""A program as one TVM module: translated, lowered by Relax, compiled by LLVM, written as a shared library."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tvm
from tvm import relax, s_tir

from graphwright.backend import Progress
from graphwright.backends.tvm.fusion import plan_fusion
from graphwright.backends.tvm.machine import tvm_target
from graphwright.backends.tvm.schedule import ScheduleLeftovers
from graphwright.backends.tvm.translate import Translator
from graphwright.errors import BackendError
from graphwright.kernels.tir.isa import choose
from graphwright.kernels.tir.linear import Linear, Schedule
from graphwright.kernels.tir.quantized_linear import DEFAULT
from graphwright.program import Program
from graphwright.target import Target
from graphwright.text import symbol_names

SINGLE = {"batch": 1, "sequence": 1, "logits": 1}
"""What is fixed in the decode form."""


def forms(program: Program) -> tuple[str, ...]:
    """Functions of the library: one for a single token of a single sequence, one for everything."""
    return ("decode", "general") if program.contract.state else ("general",)


def build(
    program: Program, target: Target, file: Path, progress: Progress, schedules: Mapping[Linear, Schedule] | None = None
) -> None:
    """Compiles a program, whose weights are in tiles, into `file`; layers without a schedule get the default one.

    Raises:
        BackendError: a node that cannot be translated, or no C compiler to link with.
    """
    progress("translate", 0.0)
    chosen = schedules or {}
    module, kernels = translate(program, target, forms(program), lambda layer: chosen.get(layer, DEFAULT))
    machine = tvm_target(target)
    progress("compile with LLVM", 0.4)
    library = build_kernels(kernels, target)
    module = module.with_attr("external_mods", [library])
    with machine, tvm.transform.PassContext(opt_level=3):
        compiled = relax.build(module, target=machine, relax_pipeline=tvm.transform.Sequential(pipeline()))
    progress("link", 0.9)
    try:
        compiled.export_library(str(file))
    except RuntimeError as error:
        raise BackendError(f"The compiled kernels cannot be linked: {error}", fix="Install gcc or clang") from error


def build_kernels(kernels: tvm.IRModule, target: Target) -> tvm.runtime.Module:
    """Machine code of kernels from `graphwright.kernels.tir`, by the passes that they need."""
    machine = tvm_target(target)
    machine = machine.with_host(machine)
    lowered = tvm.transform.Sequential([tvm.tirx.transform.BindTarget(machine), *lowering()])(kernels)
    return tvm.get_global_func("target.build.llvm")(lowered, machine)


def lowering() -> list[tvm.transform.Pass]:
    """From a kernel to what LLVM's code is written from.

    TVM's default has passes for schedules, GPUs and kernels of one statement; they take most of the time on kernels
    that are written out, and one that shares memory between buffers takes registers from them.
    """
    passes = tvm.tirx.transform
    return [
        passes.FlattenBuffer(),
        passes.BF16ComputeLegalize(),
        passes.NarrowDataType(32),
        passes.VectorizeLoop(),
        passes.UnrollLoop(),
        passes.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        passes.VerifyMemory(),
        passes.AnnotateEntryFunc(),
        passes.SplitHostDevice(),
        passes.MakePackedAPI(),
        passes.BF16StorageLegalize(),
        passes.LowerTVMBuiltin(),
        passes.LowerIntrin(),
    ]


def translate(
    program: Program,
    target: Target,
    names: Sequence[str],
    schedules: Callable[[Linear], Schedule] = lambda _layer: DEFAULT,
) -> tuple[tvm.IRModule, tvm.IRModule]:
    """A module with one Relax function per form, and one with the kernels that they call."""
    builder, kernels = relax.BlockBuilder(), relax.BlockBuilder()
    fusion, isa = plan_fusion(program), choose(target.features)
    symbols = symbol_names(program.graph, program.contract)
    for name in names:
        fixed = fixed_symbols(symbols, name)
        Translator(program, fusion, isa, builder, kernels, fixed, schedules).write(name)
    made = kernels.get()
    functions = {v: f.with_attr("global_symbol", v.name_hint) for v, f in made.functions.items()}
    return builder.get(), tvm.IRModule(functions)


def fixed_symbols(symbols: Mapping[str, str], form: str) -> dict[str, int]:
    """Sizes of the shape symbols that are constants in a form."""
    if form != "decode":
        return {}
    return {symbol: SINGLE[name] for symbol, name in symbols.items() if name in SINGLE}


def pipeline() -> list[tvm.transform.Pass]:
    """From Relax to what its virtual machine runs."""
    return [
        relax.transform.LegalizeOps(),
        ScheduleLeftovers(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
