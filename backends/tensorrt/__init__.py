"""The TensorRT backend: engines for what TensorRT takes of a program, built ahead of time on any machine.

graphwright compile MODEL --recipe int4 --target tensorrt:sm_89 -o DIR

1. cut the program into what TensorRT takes and what is left to PyTorch        (plan.py)
2. write each part as ONNX, and ask the parser about every node of it          (backends.onnx, profile tensorrt)
3. build strongly typed engines with a decode and a prefill profile            (engine.py)
4. on a GPU, run the parts one after the other over PyTorch's device memory    (executable.py)

Where TensorRT takes everything, there is one part. What stayed out, and why, is in the report.

TensorRT is imported when the backend is first used, so that programs for other targets do not need it.
"""

import importlib.util
import json
from collections.abc import Mapping
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
        from graphwright.backends.onnx.options import CARRIED, OnnxOptions

        if not any(node.target in table for table in tables(OnnxOptions(profile="tensorrt"))):
            return Support(False, f"profile tensorrt of ONNX has no translation for {op_name(node.target)}")
        if node.target in (ops.quantized_linear.target, ops.quantized_embedding.target):
            format = str(argument(node, "format"))
            if format not in CARRIED["tensorrt"]:
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

    def refuse_jit(self) -> None:
        """Refuses: engines are built ahead of time, and their state lies outside of a torch.compile region.

        Raises:
            BackendError: always, with what to do instead.
        """
        there = importlib.util.find_spec("torch_tensorrt") is not None
        raise BackendError(
            "The tensorrt backend builds engines ahead of time, and does not serve torch.compile; torch_tensorrt "
            + ("is installed, but our ops have no converters for it" if there else "is not installed"),
            fix="Use graphwright compile --target tensorrt:sm_89, or torch.compile with the target cuda",
        )


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
