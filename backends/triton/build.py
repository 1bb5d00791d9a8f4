"""Compiling kernels: several processes at once, cached by content, with a search for the best configuration.

A problem's configurations are tried from the most promising one on, by the time model. The first that compiles and
passes the gates is kept, unless a wider search is asked for: then the fastest by the model of the first few that pass,
now with their real registers and shared memory.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphwright.backend import Progress
from graphwright.backends.triton.machine_code import Resources, failures, occupied
from graphwright.errors import BackendError
from graphwright.kernels.triton.device import Device
from graphwright.kernels.triton.launch import Config, Launch, Problem
from graphwright.kernels.triton.model import rank, seconds


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        problem: what it was compiled for.
        config: the configuration it runs in.
        target: the GPU's name.
        path: file of the machine code.
        name: symbol in it.
        shared: bytes of shared memory that a launch must ask for.
        resources: what the compiler made of it.
        seconds: modelled time of the launch it was chosen for.
    """

    problem: Problem
    config: Config
    target: str
    path: Path
    name: str
    shared: int
    resources: Resources
    seconds: float


@dataclass
class Found:
    """The outcome for one problem: a binary, and the configurations that were turned down, with reasons."""

    launch: Launch
    problem: Problem
    binary: Binary | None = None
    refused: dict[str, str] = field(default_factory=dict)


class Workers:
    """Processes that compile; use it in a `with` block."""

    def __init__(self, count: int | None = None, cache: Path | None = None) -> None:
        self.count = count or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        self.cache = cache or default_cache()
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Workers":
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(
                f"The kernel cache {self.cache} cannot be written: {error.strerror}", fix="Set XDG_CACHE_HOME"
            ) from error
        for _ in range(self.count):
            self._idle.put(self._start())
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self._started:
            if process.stdin:
                # A worker that died leaves what it did not read.
                with suppress(BrokenPipeError):
                    process.stdin.close()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def _start(self) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(self.cache / "triton")
        process = subprocess.Popen(
            [sys.executable, "-m", "graphwright.backends.triton.worker", str(self.cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._started.append(process)
        return process

    def compile(self, problem: Problem, config: Config, device: Device) -> dict[str, Any]:
        """One job in the next idle process; blocks until it is done. The answer holds `error` if it failed."""
        job = {
            "module": problem.module,
            "kernel": problem.kernel,
            "types": problem.types,
            "aligned": problem.aligned,
            "constants": problem.constants,
            "tiles": config.constants,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "target": device.name,
        }
        process = self._idle.get()
        line = ""
        try:
            if process.stdin and process.stdout:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = process.wait()
            self._idle.put(self._start())
            return {"error": f"The compiler ended with status {code}"}
        self._idle.put(process)
        answer: dict[str, Any] = json.loads(line)
        return answer


def default_cache() -> Path:
    """Where compiled kernels are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "graphwright" / "triton"


def search(launch: Launch, device: Device, workers: Workers, width: int = 1) -> Found:
    """The best binary for a launch among the first `width` configurations that pass the gates."""
    problem = launch.problem()
    found = Found(launch, problem)
    passed: list[Binary] = []
    for config in rank(launch, device):
        answer = workers.compile(problem, config, device)
        if "error" in answer:
            found.refused[str(config)] = answer["error"]
            continue
        resources = Resources.from_json(answer["resources"])
        reasons = failures(resources, config, device, matrix=problem.matrix)
        if answer["scratch"]:
            reasons.append("needs scratch memory")
        if reasons:
            found.refused[str(config)] = ", ".join(reasons)
            continue
        time = seconds(launch, config, device, resources.usage)
        path = Path(answer["binary"])
        passed.append(
            Binary(problem, config, device.name, path, answer["name"], answer["shared"], resources, time)
        )  # fmt: skip
        if len(passed) == width:
            break
    # At equal modelled time, more warps on a unit hide more latency.
    found.binary = min(
        passed, key=lambda b: (round(b.seconds * 1e9), -occupied(b.resources, b.config, device)), default=None
    )
    return found


def build(
    launches: Mapping[str, Launch] | Sequence[Launch],
    device: Device,
    progress: Progress,
    *,
    width: int = 1,
    workers: Workers | None = None,
) -> list[Found]:
    """Searches for all problems of the launches, each once, in parallel."""
    distinct: dict[str, Launch] = {}
    for launch in launches.values() if isinstance(launches, Mapping) else launches:
        distinct.setdefault(launch.problem().key, launch)
    if workers is not None:
        return _in_parallel(
            list(distinct.values()), lambda each: search(each, device, workers, width), progress, device, workers.count
        )
    with Workers(min(len(distinct), len(os.sched_getaffinity(0))) or 1) as own:
        return _in_parallel(
            list(distinct.values()), lambda each: search(each, device, own, width), progress, device, own.count
        )


def _in_parallel(
    launches: Sequence[Launch], work: Callable[[Launch], Found], progress: Progress, device: Device, count: int
) -> list[Found]:
    results: dict[int, Found] = {}
    pending = queue.SimpleQueue[int]()
    for number in range(len(launches)):
        pending.put(number)
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            try:
                number = pending.get_nowait()
            except queue.Empty:
                return
            try:
                results[number] = work(launches[number])
            except BaseException as error:
                errors.append(error)
                return
            name = launches[number].kernel.fn.__name__
            progress(f"compiled {name} for {device.name}", len(results) / len(launches))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(launches))]
