"""Medusa heads on SmolLM2: trained on the frozen model, then greedy decoding with trees of guesses against plain.

    python samples/bench/medusa.py --heads 3 --steps 300 --save heads.safetensors
    python samples/bench/medusa.py --load heads.safetensors --compile --guesses 8 16

The heads read the model's own vocabulary head and train their residual layers only (`shared`). Without `--compile` the
program runs eagerly, and what counts is tokens per call; with it, tokens per second.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphwright
from graphwright import calibration
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.generate import Generator
from graphwright.engine.medusa import MedusaHeads, train
from graphwright.engine.tokenizer import Tokenizer
from graphwright.recipe import Recipe
from graphwright.sources import demo_model, open_model
from graphwright.target import Target

PASSES = ["static_cache", "select_logits", "tree_verification"]
PROMPTS = {
    "free": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "repetitive": "Repeat this list three times: old house, new house, tall house, red house, cold house.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=96, help="training texts")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training text")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--guesses", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16-products", action="store_true", help="faster, where the CPU multiplies bfloat16")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("medium" if arguments.bf16_products else "highest")
    with tempfile.TemporaryDirectory() as folder:
        source = open_model(demo_model())
        files = Path(shutil.copytree(source.tokenizer_directory, Path(folder) / "tokenizer"))
        recipe = Recipe.load({"passes": PASSES})
        if arguments.compile:
            program = graphwright.compile(demo_model(), {"passes": PASSES}, verify=False)
            generator, rewritten = program.generator, program.program
        else:
            rewritten = rewrite(capture(source.model), recipe, Target.parse("cpu"), CompileOptions(verify=False))
            run = lambda tensors: rewritten(**tensors)  # noqa: E731
            generator = Generator(run, rewritten.contract, rewritten.metadata, Tokenizer(files))
        del source
        heads = trained(rewritten, files, arguments)
    if arguments.save:
        heads.save(arguments.save)
    Console().print(table(generator, heads, arguments))


def trained(program: Any, tokenizer: Path, arguments: argparse.Namespace) -> MedusaHeads:
    """Heads from a file, or trained on text that evaluation does not use."""
    if arguments.load:
        return MedusaHeads.load(arguments.load)
    heads = MedusaHeads.initial(program, arguments.heads, shared=True)
    batches = calibration.from_text(tokenizer, None, arguments.samples, arguments.length)
    console = Console()

    def show(text: str, fraction: float) -> None:
        if int(fraction * arguments.steps) % 20 == 0:
            console.print(f"{fraction:.0%} {text}")

    train(program, heads, batches, arguments.steps, progress=show)
    return heads


def table(generator: Generator, heads: MedusaHeads, arguments: argparse.Namespace) -> Table:
    """Plain decoding and trees of several sizes on every prompt."""
    made = Table(title=f"{heads.count} Medusa heads, greedy, {arguments.new_tokens} tokens")
    for column in ("text", "guesses", "tokens/s", "tokens per call", "same text"):
        made.add_column(column, justify="left" if column == "text" else "right")
    options = {"max_new_tokens": arguments.new_tokens, "eos_token_ids": (), "chat": True}
    for text, prompt in PROMPTS.items():
        plain = generator.generate(prompt, **options)
        made.add_row(text, "plain", f"{plain.timing.tokens_per_second:.1f}", "1.00", "")
        for guesses in arguments.guesses:
            found = generator.generate(prompt, **options, draft=heads, draft_tokens=guesses)
            timing, new = found.timing, arguments.new_tokens - 1
            same = "yes" if found.tokens == plain.tokens else "no"
            per_call = new / max(new - timing.accepted_tokens, 1)
            made.add_row(text, str(guesses), f"{timing.tokens_per_second:.1f}", f"{per_call:.2f}", same)
    return made


if __name__ == "__main__":
    main()
