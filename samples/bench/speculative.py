"""Speculative decoding against plain decoding: tokens per second and how many guesses held.

    python samples/bench/speculative.py smollm2-int4-dynamic --draft smollm2-int4
    python samples/bench/speculative.py smollm2-fp32 --draft-tokens 2 4 8
    python samples/bench/speculative.py smollm2-fp32 --rounds 1 --draft draft-int2 draft-pruned draft-skip

Greedy, on free text (a story) and on repetitive text (a list that is to be repeated with a change). Artifacts come from
`graphwright compile`. A draft may also be a recipe for the same model: PyTorch then runs it node by node, which shows
how many guesses hold, and not a speed. Ways of decoding take turns; medians over rounds.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphwright
from graphwright import calibration
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.generate import PROMPT_LOOKUP, Generator
from graphwright.recipe import Recipe
from graphwright.sources import demo_model, open_model
from graphwright.target import Target

HOUSES = "1. The old house\n2. The new house\n3. The tall house\n4. The red house\n5. The cold house"
PROMPTS = {
    "free": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "repetitive": f"Repeat this list, and put the word very in front of every adjective:\n{HOUSES}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--draft", nargs="*", default=[], help="artifacts or recipes that guess, beside prompt lookup")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiled = graphwright.load(arguments.artifact)
    drafts: dict[str, Any] = {PROMPT_LOOKUP: PROMPT_LOOKUP}
    for name in arguments.draft:
        drafts[Path(name).name] = graphwright.load(name) if Path(name).is_dir() else eager(name)
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    for name, draft in drafts.items():
        ways |= {f"{name}, {n} guesses": {"draft": draft, "draft_tokens": n} for n in arguments.draft_tokens}
    table = Table(title=f"{arguments.artifact.name}, greedy, {arguments.new_tokens} tokens")
    for column in ("text", "draft", "tokens/s", "x plain", "guesses held", "same text"):
        table.add_column(column, justify="left" if column in ("text", "draft") else "right")
    for text, prompt in PROMPTS.items():
        for row in measured(compiled, prompt, ways, arguments):
            table.add_row(text, *row)
    Console().print(table)


def eager(recipe: str) -> Generator:
    """The model rewritten by a recipe, without a backend."""
    source = open_model(demo_model())
    samples = tuple(calibration.from_text(source.tokenizer_directory, None, 16, 256))
    options = CompileOptions(verify=False, calibration=samples)
    program = rewrite(capture(source.model), Recipe.load(recipe), Target.parse("cpu"), options, consume=True)
    return Generator(lambda tensors: program(**tensors), program.contract, program.metadata)


def measured(
    compiled: Any, prompt: str, ways: dict[str, dict[str, Any]], arguments: argparse.Namespace
) -> list[list[str]]:
    """One row for every way of decoding."""
    options = {"max_new_tokens": arguments.new_tokens, "eos_token_ids": (), "chat": True}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            results[name] = compiled.generate(prompt, **options, **way)
            speeds[name].append(results[name].timing.tokens_per_second)
    plain = statistics.median(speeds["plain"])
    rows = []
    for name, result in results.items():
        timing, speed = result.timing, statistics.median(speeds[name])
        held = f"{timing.accepted_tokens / timing.drafted_tokens:.0%}" if timing.drafted_tokens else ""
        same = "yes" if result.tokens == results["plain"].tokens else "no"
        rows.append([name, f"{speed:.1f}", f"{speed / plain:.2f}", held, same])
    return rows


if __name__ == "__main__":
    main()
