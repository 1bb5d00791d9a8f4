"""A process that compiles kernels: one JSON job a line on standard input, one JSON answer a line on standard output.

It is a process of its own because Triton decides at import whether kernels are compiled or interpreted, because
compiling holds the interpreter lock, and because a crash of a compiler must cost one job and not the program.
"""

import hashlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from graphwright.backends.triton.machine_code import read_amd, read_nvidia
from graphwright.errors import GraphwrightError
from graphwright.kernels.triton.device import DEVICES, Device

BINARY = {"cuda": "cubin", "rocm": "hsaco"}


def compile_job(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Compiles one kernel, or finds it in the cache; the answer holds the binary's path and what is known of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = DEVICES[job["target"]]
    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    while not isinstance(kernel, triton.JITFunction):
        # Autotuners and heuristics wrap the function.
        kernel = kernel.fn
    key = _key(job, kernel.cache_key, triton.__version__)
    entry = cache / f"{key}.json"
    if entry.is_file():
        return {**json.loads(entry.read_text()), "cached": True}
    types, constants = dict(job["types"]), {**dict(job["constants"]), **dict(job["tiles"])}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job["aligned"]}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    made = triton.compile(source, target=GPUTarget(*_triton_target(device)), options=options)
    kind = BINARY[device.target.kind]
    shared = made.metadata.shared
    read = read_nvidia(made.asm[kind], shared) if kind == "cubin" else read_amd(made.asm["amdgcn"], shared)
    binary = cache / f"{key}.{kind}"
    answer = {
        "binary": str(binary),
        "name": made.metadata.name,
        "shared": shared,
        "scratch": getattr(made.metadata, "global_scratch_size", 0) or 0,
        "resources": read.to_json(),
    }
    _write(binary, made.asm[kind])
    _write(entry, json.dumps(answer).encode())
    return {**answer, "cached": False}


def _triton_target(device: Device) -> tuple[str, Any, int]:
    arch = device.target.arch
    if device.target.kind == "cuda":
        return "cuda", int(arch.removeprefix("sm_")), device.warp_size
    return "hip", arch, device.warp_size


def _key(job: dict[str, Any], source: str, version: str) -> str:
    text = json.dumps([job, source, version], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _write(path: Path, content: bytes) -> None:
    """Writes by renaming, because several processes share the cache."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def main() -> None:
    """Answers jobs until standard input ends."""
    cache = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    # A compiler that prints must not disturb the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = compile_job(job, cache)
        except GraphwrightError as error:
            answer = {"error": str(error)}
        except Exception as error:
            first = next((part for part in reversed(str(error).splitlines()) if part.strip()), "")
            answer = {"error": f"{type(error).__name__}: {first.strip()}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
