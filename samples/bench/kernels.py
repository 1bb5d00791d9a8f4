"""Where the time of one forward goes: milliseconds per kernel of an artifact that the TVM backend compiled.

    python samples/bench/kernels.py smollm2-int4-dynamic --sequence 1 --past 128
    python samples/bench/kernels.py smollm2-int4-dynamic --sequence 512

Medians over calls. Timing every kernel costs a few microseconds each, so the sum is more than an untimed forward takes.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import tvm
import tvm_ffi
from rich.console import Console
from rich.table import Table
from tvm import relax

import graphwright
from graphwright.backends.tvm import LIBRARY, threads
from graphwright.calling import Arguments
from graphwright.compiled import KERNELS
from graphwright.errors import GraphwrightError


class Stopwatch:
    """What TVM's virtual machine calls before and after every kernel."""

    def __init__(self) -> None:
        self.forwards: list[dict[str, list[float]]] = []
        self._started = 0.0

    def __call__(self, _function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
        if before:
            self._started = time.perf_counter()
        else:
            self.forwards[-1][name].append(time.perf_counter() - self._started)
        return 0

    def rows(self) -> list[tuple[str, int, float]]:
        """Name, calls and milliseconds of every kernel in one forward, the longest first."""
        names = self.forwards[0]
        found = [
            (name, len(names[name]), 1e3 * statistics.median(sum(forward[name]) for forward in self.forwards))
            for name in names
        ]
        return sorted(found, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=1)
    parser.add_argument("--past", type=int, default=0, help="tokens in the cache before the timed ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiled = graphwright.load(arguments.artifact)
    if compiled.backend != "tvm":
        raise SystemExit(f"{arguments.artifact} was compiled by {compiled.backend}; compile it with --backend tvm")
    rows = timed(compiled, arguments)
    total = sum(milliseconds for *_, milliseconds in rows)
    what = f"{arguments.batch} x {arguments.sequence} tokens, {arguments.past} in the cache"
    table = Table(title=f"{what}: {total:.2f} ms")
    for column in ("kernel", "calls", "ms", "%"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, calls, milliseconds in rows:
        table.add_row(name, str(calls), f"{milliseconds:.3f}", f"{100 * milliseconds / total:.1f}")
    Console().print(table)


def timed(compiled: Any, arguments: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Calls the fitting form some times and returns its kernels' rows."""
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(compiled.folder / KERNELS / LIBRARY)), tvm.cpu())
    contract, end = compiled.program.contract, arguments.past + arguments.sequence
    if not contract.state:
        raise GraphwrightError("The program has no key-value cache", fix="Use a recipe with static_cache")
    steps = torch.arange(end)
    tensors = {
        "input_ids": torch.randint(0, compiled.program.metadata.vocab_size, (arguments.batch, arguments.sequence)),
        "positions": steps[arguments.past :].expand(arguments.batch, -1),
        "key_positions": steps,
        "logit_index": torch.full((arguments.batch, 1), arguments.sequence - 1),
        **contract.allocate({"batch": arguments.batch, "capacity": end + 1}),
    }
    ordered = Arguments(contract)
    form = "decode" if ordered.one_token(tensors) else "general"
    weights = tvm_ffi.Array([tvm_ffi.from_dlpack(w.detach().contiguous()) for w in compiled.program.weights().values()])
    threads.follow_torch()
    stopwatch = Stopwatch()
    machine[form](*ordered(tensors), weights)
    machine.set_instrument(stopwatch)
    for _ in range(arguments.rounds):
        stopwatch.forwards.append(defaultdict(list))
        machine[form](*ordered(tensors), weights)
    return stopwatch.rows()


if __name__ == "__main__":
    main()
