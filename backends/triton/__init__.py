"""The Triton backend: programs become kernels for NVIDIA and AMD GPUs, compiled on any machine.

Stages of `compile`, in order:

1. lower semantic ops to ops with kernels, fusing neighbours                              (lowering.py, ops.py)
2. find every launch that the program can make, over all classes of sizes                 (plan.py)
3. choose a configuration for each, compile it, and check the machine code                (build.py, machine_code.py)
4. write machine code with what it takes to launch it, and the lowered graph              (store.py)
5. on a GPU, run the graph with those binaries, and choose tokens where the logits lie    (executable.py, driver.py)

Triton is imported when the backend is first used, so that programs for other targets do not need it.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from graphwright import serialize
from graphwright.backend import Executable, Progress, Support
from graphwright.contract import Contract
from graphwright.errors import BackendError, TargetError
from graphwright.program import Program
from graphwright.target import Target, local_gpu

GRAPH = "graph.json"


class TritonBackend:
    """Compiles for GPUs, on machines with and without one."""

    name = "triton"
    kinds = ("cuda", "rocm")

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether a Triton kernel serves the call."""
        _require_triton()
        from graphwright.backends.triton.lowering import support
        from graphwright.kernels.triton.device import Device

        return support(node, Device.of(target))

    def prepare(self, program: Program, target: Target) -> Program:
        """The program as it is: kernels read weights in the core's layout."""
        return program

    def compile(self, program: Program, target: Target, directory: Path, progress: Progress) -> Executable:
        """Compiles every kernel that the program can launch, for every class of sizes.

        Raises:
            BackendError: Triton is missing, or a kernel passes its gates in no configuration.
        """
        _require_triton()
        from graphwright.backends.triton import build, lowering, plan, store
        from graphwright.backends.triton.executable import TritonExecutable
        from graphwright.kernels.triton.device import Device

        device = Device.of(target)
        lowered = lowering.lower(program, device)
        launches = [*plan.launches(lowered, device), *plan.sampling_launches(lowered, device)]
        found = build.build(launches, device, progress)
        _refuse_missing(found, target)
        store.write(directory, target.name, found)
        (directory / GRAPH).write_text(json.dumps(serialize.graph_to_json(lowered.graph)))
        return TritonExecutable(lowered.module, lowered.contract, target.name, directory)

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from compiled files.

        Raises:
            TargetError: this machine's GPU is not the target.
            ArtifactError: the artifact holds no kernels for it.
        """
        from graphwright.backends.triton import cache_ops, kivi_ops, ops, store
        from graphwright.backends.triton.executable import TritonExecutable, require_gpu

        require_gpu(target.name)
        store.read(directory, target.name)
        for made in (cache_ops.cached_attention, kivi_ops.attend_kivi_cache):
            assert made.target in ops.OPS  # noqa: S101 - importing registers what the graph names
        module = serialize.graph_from_json(json.loads((directory / GRAPH).read_text()), weights)
        return TritonExecutable(module, contract, target.name, directory)

    def kernels(self, directory: Path) -> list[dict[str, Any]]:
        """One row for every kernel in an artifact's directory: its resources and the estimate, per target."""
        _require_triton()
        from graphwright.backends.triton import store

        return [row for name in store.targets_in(directory) for row in store.rows(store.read(directory, name), name)]

    def jit(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """A callable over the contract's inputs in order; kernels are compiled as they are met, the rest by Inductor.

        Raises:
            TargetError: this machine has no GPU.
        """
        _require_triton()
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        from graphwright.backends.triton import lowering
        from graphwright.kernels.triton.device import DEVICES

        here = local_gpu()
        if here is None:
            raise TargetError(
                "The triton backend of torch.compile needs a GPU, and PyTorch finds none on this machine",
                fix="Compile ahead of time with `graphwright compile --target cuda:sm_90`, or use the target cpu",
            )
        lowered = lowering.lower(program, DEVICES.get(here))
        fakes = [node.meta["val"] for node in lowered.graph.find_nodes(op="placeholder")]
        compiled = compile_fx(lowered.module, fakes, decompositions=select_decomp_table())
        return lambda arguments: compiled(*arguments)


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise BackendError("The triton backend needs the package triton", fix="pip install 'graphwright[triton]'")


def _refuse_missing(found: Sequence[Any], target: Target) -> None:
    """Every kernel that could not be compiled, with the reasons; a program with a hole is no program."""
    missing = [one for one in found if one.binary is None]
    if not missing:
        return
    reasons = "; ".join(
        f"{one.problem.kernel}: " + ", ".join(f"{config}: {why}" for config, why in list(one.refused.items())[:3])
        for one in missing
    )
    raise BackendError(
        f"{len(missing)} of {len(found)} kernels pass the gates in no configuration on {target.name}: {reasons}",
        fix="Leave out the pass that made these ops, or report the kernel",
    )


BACKEND = TritonBackend()
"""What the registry finds."""
