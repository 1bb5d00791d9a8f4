"""The benchmark against peers: one interleaved run, 2 threads, batch 1, SmolLM2; medians and ratios.

    python samples/bench/compare.py smollm2-fp32 smollm2-int8 smollm2-int4-dynamic --rounds 5 --gguf smollm2-q4_0.gguf
    python samples/bench/compare.py random-int4-dynamic --model random-llama --gguf random-llama/model-q4_0.gguf \
        --batches 8 --windows 0 --without-torch

Arguments are artifact directories; the peers are eager Hugging Face, torch.compile with a static cache, and llama.cpp
and OpenVINO GenAI on the GGUF files given, which `gguf_models.py` writes. `--batches` times the artifacts at more
batch sizes too; tokens per second are those of all sequences together. Beside the speed stand the share of the memory
bandwidth, measured in the same run, that reading all weights once per step needs, and the accuracy on held-out text of
whoever gives logits.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import graphwright
from graphwright import accuracy
from graphwright.engine.tokenizer import Tokenizer
from graphwright.sources import demo_model, open_model

# PYTHONSAFEPATH keeps a script's own folder off the path; this one is wanted.
sys.path.append(str(Path(__file__).parent))
from peers import HuggingFace, LlamaCpp, OpenVino, Peer, TorchCompile, interleaved, read_bandwidth


def accuracies(peers: list[Peer], tokenizer: Tokenizer, count: int) -> dict[str, dict[str, float]]:
    """Perplexity, divergence from the first peer and greedy agreement with it, on held-out text."""
    windows = accuracy.token_windows(tokenizer.encode(accuracy.built_in_text(held_out=True)), 256, count)
    found = {}
    with torch.no_grad():
        for peer in peers:
            if peer.logits is not None:
                score = accuracy.measure(peer.logits, windows, reference=peers[0].logits)
                found[peer.name] = {
                    "perplexity": round(score.perplexity, 3),
                    "KL": round(score.mean_kl or 0.0, 4),
                    "same token": round(score.greedy_agreement or 0.0, 3),
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a file for llama.cpp and OpenVINO")
    parser.add_argument("--model", default=str(demo_model()), help="what eager and torch.compile run")
    parser.add_argument("--without-torch", action="store_true", help="leave out eager and torch.compile")
    parser.add_argument("--batches", type=int, nargs="*", default=[], help="more batch sizes for the artifacts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=6, help="of 256 tokens, for perplexity; 0 for none")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(stderr=True)
    peers: list[Peer] = []
    if not arguments.without_torch:
        model = open_model(arguments.model).model
        peers = [HuggingFace(model), TorchCompile(model)]
    compiled = {path.name: graphwright.load(path) for path in arguments.artifacts}
    peers += [Peer.of_artifact(name, artifact) for name, artifact in compiled.items()]
    peers += [
        Peer.of_artifact(f"{name} x {batch}", artifact, batch)
        for name, artifact in compiled.items()
        for batch in arguments.batches
    ]
    peers += [kind(path) for path in arguments.gguf for kind in (LlamaCpp, OpenVino)]
    bandwidth = read_bandwidth()
    timings = interleaved(
        peers,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        progress=console.print,
    )
    first = timings[peers[0].name]
    scores = {}
    if arguments.windows:
        scores = accuracies(peers, Tokenizer(arguments.artifacts[0] / "tokenizer"), arguments.windows)
    rows = [
        {
            "peer": peer.name,
            "decode tok/s": round(timings[peer.name].decode, 1),
            "x first": round(timings[peer.name].decode / first.decode, 2),
            "prefill tok/s": round(timings[peer.name].prefill, 1),
            "x first ": round(timings[peer.name].prefill / first.prefill, 2),
            "weights MB": round(peer.weight_bytes / 1e6, 1),
            "% of bandwidth": round(100 * peer.weight_bytes * timings[peer.name].decode / peer.batch / bandwidth),
            **scores.get(peer.name, {"perplexity": "", "KL": "", "same token": ""}),
        }
        for peer in peers
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    title = f"{arguments.threads} threads, batch 1, medians of {arguments.rounds} rounds; "
    layout: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    table = Table(title=f"{title}memory reads {bandwidth / 1e9:.1f} GB/s", **layout)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "peer" else "right", no_wrap=column == "peer")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
