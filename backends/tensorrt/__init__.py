"""The TensorRT backend: one engine per program and GPU, built ahead of time on any machine.

graphwright compile MODEL --recipe int4 --target tensorrt:sm_89 -o DIR

1. write the program as ONNX that TensorRT's parser takes                      (backends.onnx, profile tensorrt)
2. ask the parser about every node; name those that it refuses, and why        (engine.py)
3. build a strongly typed engine with a decode and a prefill profile           (engine.py)
4. on a GPU, run it over PyTorch's device memory                               (executable.py)

TensorRT is imported when the backend is first used, so that programs for other targets do not need it.
"""

import importlib.util
import json
import tempfile
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

    def supports(self, node: fx.Node, target: Target) -> Support:
        """Whether the node has a form that TensorRT's parser takes."""
        _require_packages()
        from graphwright.backends.onnx.exporter import CARRIED
        from graphwright.backends.onnx.model import tables
        from graphwright.backends.onnx.options import OnnxOptions

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
        """Builds the engine.

        Raises:
            BackendError: a package is missing, or TensorRT refuses a node; all of them are named with the reasons.
        """
        _require_packages()
        from graphwright.backends.onnx import model
        from graphwright.backends.onnx.options import OnnxOptions
        from graphwright.backends.tensorrt import engine
        from graphwright.backends.tensorrt.executable import TensorrtExecutable

        self._refuse({node.name: self.supports(node, target).reason for node in program.calls()})
        progress("translate for TensorRT", 0.0)
        with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
            model.save(model.build(program, OnnxOptions(profile="tensorrt")), Path(folder))
            self._refuse(engine.refused(Path(folder) / model.MODEL))
            built = engine.build(Path(folder) / model.MODEL, program.contract, target.arch, progress)
        path = _engine_file(directory, target)
        path.write_bytes(built.data)
        path.with_suffix(".json").write_text(json.dumps(built.to_json(), indent=1))
        return TensorrtExecutable(program.contract, target, path, built.to_json())

    def load(self, contract: Contract, weights: Mapping[str, Tensor], target: Target, directory: Path) -> Executable:
        """The executable from a built engine.

        Raises:
            TargetError: this machine's GPU is not the target.
            ArtifactError: the artifact holds no engine for it.
        """
        from graphwright.backends.tensorrt.executable import TensorrtExecutable, require_gpu

        require_gpu(target)
        _require_packages()
        path = _engine_file(directory, target)
        if not path.is_file():
            raise ArtifactError(f"The artifact holds no engine for {target.arch}", fix="Compile the model for it")
        return TensorrtExecutable(contract, target, path, json.loads(path.with_suffix(".json").read_text()))

    def kernels(self, directory: Path) -> list[dict[str, Any]]:
        """One row for every engine of an artifact."""
        rows = []
        for path in sorted(directory.glob("*.engine")):
            facts = json.loads(path.with_suffix(".json").read_text())
            rows.append(
                {
                    "engine": path.name,
                    "bytes": path.stat().st_size,
                    "weight bytes": facts["weight_bytes"],
                    "quantized weights": facts["quantized"],
                    "profiles": len(facts["profiles"]),
                    "layers": sum(facts["layers"].values()),
                }
            )
        return rows

    def jit(self, program: Program) -> Callable[[Sequence[Any]], Any]:
        """Refused: engines are built ahead of time, and their state lies outside of a torch.compile region.

        Raises:
            BackendError: always, with what to do instead.
        """
        missing = importlib.util.find_spec("torch_tensorrt") is None
        raise BackendError(
            "The tensorrt backend builds engines ahead of time, and does not serve torch.compile"
            + ("; torch_tensorrt, which would, is not installed" if missing else ""),
            fix="Use `graphwright compile --target tensorrt:sm_89`, or torch.compile with the target cuda",
        )

    def _refuse(self, reasons: Mapping[str, str]) -> None:
        found = {name: reason for name, reason in reasons.items() if reason}
        if not found:
            return
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(found.items())[:8])
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise BackendError(
            f"TensorRT does not take {len(found)} nodes of the program: {shown}{more}",
            fix="Use a recipe without what made them, or another target",
        )


def _engine_file(directory: Path, target: Target) -> Path:
    return directory / f"{target.arch}.engine"


def _require_packages() -> None:
    for name in ("tensorrt_rtx", "onnx", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            raise BackendError(
                f"The tensorrt backend needs the package {name.replace('_', '-')}",
                fix="pip install 'graphwright[tensorrt]'",
            )


BACKEND = TensorrtBackend()
"""What the registry finds."""
