"""The main job on a real model: SmolLM2-135M-Instruct becomes a compiled, quantized program that answers a prompt.

    make demo

Captures the model, compiles it four times (fp32, int8, int4, and int4 with integer products), saves the results under
`.demo/`, loads the int4 one in a fresh process without the modelling library, lets it answer, and compares speed, size
and perplexity with eager Hugging Face and with torch.compile over a static cache.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import graphwright
from graphwright import accuracy
from graphwright.engine.tokenizer import Tokenizer
from graphwright.sources import demo_model, open_model

# The Makefile keeps a script's own folder off the path; this one is wanted.
sys.path.append(str(Path(__file__).parent / "bench"))
from peers import HuggingFace, Peer, TorchCompile, interleaved

RECIPES = ("fp32", "int8", "int4", "int4-dynamic")
PROMPT = "What is a compiler? Answer in two sentences."
WINDOW, WINDOWS = 256, 6

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(".demo"), help="where the artifacts go")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    artifacts = compile_all(arguments.output)
    console.rule("int4, loaded in a fresh process, answers")
    answer(artifacts["int4"])
    console.rule("Comparison")
    compare(artifacts)
    console.print(f"All in {time.perf_counter() - started:.0f} s. Reports: {arguments.output}/*/report.html")


def compile_all(output: Path) -> dict[str, Path]:
    """One process per recipe, so that the peak memory of each is its own; an artifact that is there is replaced."""
    artifacts = {}
    for recipe in RECIPES:
        artifacts[recipe] = output / f"smollm2-{recipe}"
        command = ["compile", str(demo_model()), "--recipe", recipe, "--force", "--output", str(artifacts[recipe])]
        run_graphwright(*command)
    return artifacts


def answer(artifact: Path) -> None:
    """Asks the artifact a question in a process that never imports transformers."""
    console.print(f"[bold]{PROMPT}[/]")
    run_graphwright("run", str(artifact), PROMPT, "--chat", "--max-new-tokens", "80")


def run_graphwright(*arguments: str) -> None:
    """Runs the command line of this installation."""
    subprocess.run([str(Path(sys.executable).parent / "graphwright"), *arguments], check=True)


def compare(artifacts: dict[str, Path]) -> None:
    """Measures everybody in one process, taking turns."""
    source = open_model(demo_model())
    compiled = {name: graphwright.load(path) for name, path in artifacts.items()}
    peers: list[Peer] = [HuggingFace(source.model), TorchCompile(source.model)]
    peers += [Peer.of_artifact(f"graphwright {name}", artifact) for name, artifact in compiled.items()]
    speeds = interleaved(peers, prompt_tokens=512, new_tokens=32, rounds=3, progress=console.print)

    tokenizer = Tokenizer(artifacts["fp32"] / "tokenizer")
    windows = accuracy.token_windows(tokenizer.encode(accuracy.built_in_text(held_out=True)), WINDOW, WINDOWS)
    original = lambda ids: source.model(input_ids=ids).logits  # noqa: E731
    with torch.no_grad():
        scores = {name: accuracy.measure(c.logits, windows, reference=original) for name, c in compiled.items()}
    baseline = scores["fp32"].reference_perplexity or 0.0

    title = "SmolLM2-135M-Instruct, batch 1, decode after 128 tokens, prefill of 512; medians"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in ("decode tok/s", "x eager", "prefill tok/s", "weights MB", "perplexity", "KL nats"):
        table.add_column(column, justify="right")
    eager = speeds[peers[0].name].decode
    for peer in peers:
        speed = speeds[peer.name]
        score = scores.get(peer.name.removeprefix("graphwright "))
        table.add_row(
            peer.name,
            f"{speed.decode:.1f}",
            f"{speed.decode / eager:.2f}",
            f"{speed.prefill:.0f}",
            f"{peer.weight_bytes / 1e6:.0f}",
            f"{score.perplexity if score else baseline:.2f}",
            f"{score.mean_kl:.4f}" if score and score.mean_kl is not None else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()
