"""The TensorRT backend: engines for what TensorRT takes of a program, built ahead of time on any machine.

graphwright compile MODEL --recipe int4 --target tensorrt:sm_89 -o DIR

1. cut the program into what TensorRT takes and what is left to PyTorch        (plan.py)
2. write each part as ONNX, and ask the parser about every node of it          (backends.onnx, profile tensorrt)
3. build strongly typed engines with a decode and a prefill profile            (engine.py)
4. on a GPU, run the parts one after the other over PyTorch's device memory    (executable.py)

Where TensorRT takes everything, there is one part. What stayed out, and why, is in the report. This way builds with
TensorRT for RTX (`graphwright[tensorrt]`), because that needs no GPU.

torch.compile(model, backend="graphwright", options={"backend": "tensorrt", "recipe": "int4"})

1. bring the rewritten region to ATen and the ops that have converters         (handover.py)
2. hand it to torch_tensorrt.dynamo, with converters for these ops             (converters.py)
3. run its engines, and what it left to PyTorch between them                   (jit.py)

This way needs torch_tensorrt (`graphwright[torch-tensorrt]`) and the GPU at hand, and saves nothing: use it where a
model stays in its own Python code, with its own cache and its own generation loop.

Both are imported when they are first used, so that programs for other targets do not need them.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from graphwright import ops
from graphwright.backend import Executable, Progress, Support
from graphwright.contract import Contract
from graphwright.errors import ArtifactError, BackendError
from graphwright.match import argument
from graphwright.program import Program
from graphwright.target import Target
from graphwright.text import op_name


class TensorrtBackend:
    """Compiles for NVIDIA GPUs, on machines with and without one."""

    name = "tensorrt"
    kinds = ("tensorrt",)

    def require(self) -> None:
        """Refuses to begin without TensorRT and ONNX.

        Raises:
            BackendError: a package is missing.
        """
        require_packages()

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether the node has a form that TensorRT's parser takes."""
        require_packages()
        from graphwright.backends.onnx.model import tables
        from graphwright.backends.onnx.options import OnnxOptions
        from graphwright.backends.tensorrt.takes import FORMATS

        if not any(node.target in table for table in tables(OnnxOptions(profile="tensorrt"))):
            return Support(False, f"profile tensorrt of ONNX has no translation for {op_name(node.target)}")
        if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
            format = str(argument(node, "format"))
            if format not in FORMATS:
                return Support(False, f"TensorRT has no weights of format {format}")
        return Support(True)

    def prepare(self, program: Program, target: Target) -> Program:
        """The program as it is: the engine has weights of its own."""
        return program

    def compile(self, program: Program, target: Target, directory: Path, progress: Progress) -> Executable:
        """Builds an engine for each part that TensorRT takes.

        Raises:
            BackendError: a package is missing, or TensorRT takes nothing that is worth an engine; says why.
        """
        require_packages()
        from graphwright.backends.tensorrt import plan
        from graphwright.backends.tensorrt.executable import TensorrtExecutable

        progress("translate for TensorRT", 0.0)
        answers = {node.name: self.supports(node, target) for node in program.calls()}
        left = {name: answer.reason for name, answer in answers.items() if not answer.ok}
        facts = plan.build(program, left, target, directory, progress)
        return TensorrtExecutable(program.contract, target, facts, directory, program.weights())

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from a built engine.

        Raises:
            TargetError: this machine's GPU is not the target.
            ArtifactError: the artifact holds no engine for it.
        """
        from graphwright.backends.tensorrt.executable import TensorrtExecutable, require_gpu

        require_gpu(target)
        require_packages()
        path = directory / f"{target.arch}.json"
        if not path.is_file():
            raise ArtifactError(f"The artifact holds no engine for {target.arch}", fix="Compile the model for it")
        return TensorrtExecutable(contract, target, json.loads(path.read_text()), directory, weights)

    def left(self, directory: Path, target: Target) -> dict[str, str]:
        """The nodes that stayed out of the engines, with the reasons."""
        found: dict[str, str] = json.loads((directory / f"{target.arch}.json").read_text())["left"]
        return found

    def kernels(self, directory: Path) -> list[dict[str, Any]]:
        """One row for every part of an artifact."""
        rows = []
        for plan in sorted(path for path in directory.glob("*.json") if not path.name.endswith(".graph.json")):
            for part in json.loads(plan.read_text())["parts"]:
                facts = part if part["kind"] == "engine" else {}
                rows.append(
                    {
                        "part": part["file"],
                        "runs on": "TensorRT" if facts else "PyTorch",
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


def require_packages() -> None:
    """Refuses to go on where a package is missing.

    Raises:
        BackendError: says which, and what to install.
    """
    for name in ("tensorrt_rtx", "onnx", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            raise BackendError(
                f"The tensorrt backend needs the package {name.replace('_', '-')}",
                fix="pip install 'graphwright[tensorrt]'",
            )


BACKEND = TensorrtBackend()
"""What the registry finds."""
