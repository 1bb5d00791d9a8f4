"""How soon and in how much memory an artifact answers: each in fresh processes, medians.

    python samples/bench/first_token.py smollm2-int4-dynamic --repetitions 5

Prints the seconds to import Graphwright, to load the artifact, and from then to the first token of a prompt; the peak
of the resident memory, how much of it was there before the artifact was loaded (Python and torch), and its ratio to
the artifact's files plus the cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

CHILD = """
import json, resource, sys, time
started = time.perf_counter()
import torch, graphwright
torch.set_num_threads(int(sys.argv[2]))
imported = time.perf_counter()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
compiled = graphwright.load(sys.argv[1])
loaded = time.perf_counter()
ids = torch.randint(0, compiled.program.metadata.vocab_size, (1, int(sys.argv[3])))
token = next(iter(compiled.stream(ids, max_new_tokens=2, eos_token_ids=())))
first = time.perf_counter()
print(json.dumps({"import s": imported - started, "load s": loaded - imported, "first token s": first - loaded,
                  "peak MB": peak() / 1e6, "before loading MB": before / 1e6}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    title = f"{arguments.threads} threads, a prompt of {arguments.prompt_tokens} tokens; medians"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("artifact", no_wrap=True)
    rows = {path: measured(path, arguments) for path in arguments.artifacts}
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for path, row in rows.items():
        table.add_row(path.name, *(f"{value:.2f}" for value in row.values()))
    Console().print(table)


def measured(artifact: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over fresh processes."""
    command = [sys.executable, "-c", CHILD, artifact, arguments.threads, arguments.prompt_tokens]
    runs = [
        json.loads(subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout)
        for _ in range(arguments.repetitions)
    ]
    row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    files = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file()) / 1e6
    return row | {"files MB": files, "of its own / files": (row["peak MB"] - row["before loading MB"]) / files}


if __name__ == "__main__":
    main()
