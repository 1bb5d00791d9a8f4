"""Perplexity over the length of the text, with every way of scaling rotary embeddings: SmolLM2, held-out English.

    python samples/bench/long_context.py --lengths 1024 2048 4096 8192 12288 --windows 2

Scored are the last 256 tokens of texts of each length, the same for all lengths. SmolLM2 was trained for 8192 tokens:
beyond them the plain model fails, and before them every scaling costs something, except the dynamic one. `--trained` is
the context that the passes scale from, the model's own if left out.
"""

import argparse
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphwright import accuracy
from graphwright.backends.inductor.attention import attention_by_flash
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.tokenizer import Tokenizer
from graphwright.ops import attention
from graphwright.program import Program
from graphwright.recipe import Recipe
from graphwright.sources import demo_model, open_model
from graphwright.target import Target

METHODS = ("plain", "position_interpolation", "ntk_aware", "dynamic_ntk", "yarn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 12288])
    parser.add_argument("--trained", type=int, default=0, help="context to scale from; 0 for the model's own")
    parser.add_argument("--factor", type=float, default=0, help="0: longest length over the context")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16-products", action="store_true", help="faster, where the CPU multiplies bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("medium" if arguments.bf16_products else "highest")
    source = open_model(demo_model())
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source.tokenizer_directory, Path(folder) / "tokenizer")
        program = capture(source.model)
        text = Tokenizer(Path(folder) / "tokenizer").encode(accuracy.built_in_text(held_out=True))
    trained = arguments.trained or program.metadata.context_length
    program = program.with_(metadata=program.metadata.with_(context_length=trained))
    factor = arguments.factor or max(1.0, max(arguments.lengths) / trained)
    table = Table(title=f"Perplexity of the last {accuracy.SCORED} tokens, scaled from {trained} by {factor:g}")
    for column in ("method", *map(str, arguments.lengths)):
        table.add_column(column, justify="left" if column == "method" else "right")
    ends = accuracy.text_ends(text, arguments.lengths, arguments.windows)
    for method in arguments.methods:
        logits = functools.partial(last_logits, scaled(program.clone(), method, factor))
        found = accuracy.over_lengths(logits, text, ends, arguments.lengths)
        table.add_row(method, *(f"{found[length]:.2f}" for length in arguments.lengths))
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps({"method": method, "factor": factor, **found}) + "\n")
    Console().print(table)


def scaled(program: Program, method: str, factor: float) -> Program:
    """The program with scaled frequencies, logits on demand, and attention that stores no scores."""
    passes: list[Any] = [] if method == "plain" else [{method: {"factor": factor}}]
    recipe = Recipe.load({"passes": [*passes, "select_logits"]})
    made = rewrite(program, recipe, Target.parse("cpu"), CompileOptions(verify=False))
    for node in made.calls(attention.target):
        node.target = attention_by_flash
    made.module.recompile()
    return made


@torch.no_grad()
def last_logits(program: Program, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The module itself: its contract would refuse the plain model texts that it was not trained for."""
    places = torch.arange(ids.shape[1] - count, ids.shape[1])[None]
    given = {"token": ids, "attention_mask": torch.ones_like(ids), "logit_index": places}
    logits: torch.Tensor = program.module(*(given[spec.role] for spec in program.contract.inputs))[0]
    return logits


if __name__ == "__main__":
    main()
