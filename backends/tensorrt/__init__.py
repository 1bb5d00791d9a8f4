"""The TensorRT backend: engines for what TensorRT takes of a program, built ahead of time on any machine.

graphwright compile MODEL --recipe int4 --target tensorrt:sm_89 -o DIR

1. cut the program into what TensorRT takes and what is left to PyTorch        (plan.py)
2. have a builder write each part as a network, and refuse nodes of it         (builder.py)
   - as ONNX, by TensorRT's parser (`graphwright[tensorrt]`)                   (onnx_builder.py, backends.onnx)
   - by torch_tensorrt.dynamo, with converters for our ops, where that is      (torch_builder.py, handover.py,
     installed (`graphwright[torch-tensorrt]`)                                  network.py, converters.py)
3. build strongly typed engines with a decode and a prefill profile            (engine.py)
4. on a GPU, run the parts one after the other over PyTorch's device memory    (executable.py)

Where TensorRT takes everything, there is one part. What stayed out, and why, is in the report, and so is the builder.
TensorRT for RTX builds for any GPU without one, either way; `torch-tensorrt` proper builds for the GPU at hand.

torch.compile(model, backend="graphwright", options={"backend": "tensorrt", "recipe": "int4"})

1. bring the rewritten region to ATen and the ops that have converters         (handover.py)
2. hand it to torch_tensorrt.dynamo, with converters for these ops             (converters.py)
3. run its engines, and what it left to PyTorch between them                   (jit.py)

This way needs torch_tensorrt (`graphwright[torch-tensorrt]`) and the GPU at hand, and saves nothing: use it where a
model stays in its own Python code, with its own cache and its own generation loop.

Both are imported when they are first used, so that programs for other targets do not need them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from graphwright.backend import Executable, Progress, Support
from graphwright.contract import Contract
from graphwright.errors import ArtifactError
from graphwright.program import Program
from graphwright.target import Target


class TensorrtBackend:
    """Compiles for NVIDIA GPUs, on machines with and without one."""

    name = "tensorrt"
    kinds = ("tensorrt",)

    def require(self, target: Target) -> None:
        """Refuses to begin without a builder for the target.

        Raises:
            BackendError: a package is missing.
            TargetError: the one that is there builds for another GPU.
        """
        from graphwright.backends.tensorrt import builder

        builder.require(target)

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether the node has a form that the builder takes, as far as the node alone shows."""
        from graphwright.backends.tensorrt import builder

        return builder.find(target).supports(node)

    def prepare(self, program: Program, target: Target) -> Program:
        """The program as it is: the engine has weights of its own."""
        return program

    def compile(self, program: Program, target: Target, directory: Path, progress: Progress) -> Executable:
        """Builds an engine for each part that TensorRT takes.

        Raises:
            BackendError: a package is missing, or TensorRT takes nothing that is worth an engine; says why.
        """
        from graphwright.backends.tensorrt import builder, plan
        from graphwright.backends.tensorrt.executable import TensorrtExecutable

        chosen = builder.find(target)
        progress("translate for TensorRT", 0.0)
        answers = {node.name: chosen.supports(node) for node in program.calls()}
        left = {name: answer.reason for name, answer in answers.items() if not answer.ok}
        facts = plan.build(program, left, chosen, target, directory, progress)
        return TensorrtExecutable(program.contract, target, facts, directory, program.weights())

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from a built engine.

        Raises:
            TargetError: this machine's GPU is not the target.
            BackendError: the library that built the engines is missing.
            ArtifactError: the artifact holds no engine for it.
        """
        from graphwright.backends.tensorrt.executable import TensorrtExecutable, require_gpu, require_library

        require_gpu(target)
        path = directory / f"{target.arch}.json"
        if not path.is_file():
            raise ArtifactError(f"The artifact holds no engine for {target.arch}", fix="Compile the model for it")
        plan = json.loads(path.read_text())
        require_library(plan)
        return TensorrtExecutable(contract, target, plan, directory, weights)

    def left(self, directory: Path, target: Target) -> dict[str, str]:
        """The nodes that stayed out of the engines, with the reasons."""
        found: dict[str, str] = json.loads((directory / f"{target.arch}.json").read_text())["left"]
        return found

    def builder(self, directory: Path, target: Target) -> str:
        """What built the engines for a target, with versions."""
        from graphwright.backends.tensorrt.executable import maker

        return str(maker(json.loads((directory / f"{target.arch}.json").read_text())))

    def kernels(self, directory: Path) -> list[dict[str, Any]]:
        """One row for every part of an artifact."""
        from graphwright.backends.tensorrt.executable import maker

        rows = []
        for plan in sorted(path for path in directory.glob("*.json") if not path.name.endswith(".graph.json")):
            whole = json.loads(plan.read_text())
            for part in whole["parts"]:
                facts = part if part["kind"] == "engine" else {}
                rows.append(
                    {
                        "part": part["file"],
                        "runs on": "TensorRT" if facts else "PyTorch",
                        "built by": str(maker(whole)) if facts else "",
                        "nodes": part["nodes"],
                        "bytes": (directory / part["file"]).stat().st_size,
                        "weight bytes": facts.get("weight_bytes", ""),
                        "quantized weights": facts.get("quantized", ""),
                        "profiles": len(facts.get("profiles", ())),
                        "layers": sum(facts.get("layers", {}).values()),
                    }
                )
        return rows

    def require_jit(self, target: Target | None = None) -> None:
        """Refuses to serve torch.compile without torch_tensorrt and the target's GPU.

        Raises:
            BackendError: torch_tensorrt or a GPU is missing.
            TargetError: this machine's GPU is not the target.
        """
        from graphwright.backends.tensorrt import jit
        from graphwright.backends.tensorrt.executable import require_gpu

        jit.require_torch_tensorrt()
        if target is not None:
            require_gpu(target)

    def jit(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """A callable over the contract's inputs in order, compiled by torch_tensorrt at the first call.

        Raises:
            BackendError: torch_tensorrt cannot be imported.
        """
        from graphwright.backends.tensorrt import jit

        jit.torch_tensorrt()
        return jit.TensorrtRegion(program)


BACKEND = TensorrtBackend()
"""What the registry finds."""
