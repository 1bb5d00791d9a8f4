"""GPTQ and AWQ beside LLM Compressor's: the same layers of SmolLM2, the same calibration tokens, one table.

    python -m venv peers
    peers/bin/pip install llmcompressor==0.14.0.1
    python samples/bench/quantizers.py --python peers/bin/python

The package wants another version of transformers than this repository, so it runs in an environment of its own, in
`llm_compressor.py`. Both sides use groups with zero points; GPTQ with activation order over fixed groups, 1 % damping.
`layer error` is the mean relative error of the outputs of GPTQ's layers on the calibration tokens: ours are solved for
the inputs that each layer had before, as theirs are in the first layer; `at most theirs` counts them up to 0.1 %. AWQ
folds scales, so its layers have no common inputs. `KL` is that of the logits of the first layers alone, on held-out
text, each side behind its own quantized layers.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import fx

from graphwright import accuracy, calibration, rounding, structure
from graphwright.calibration import Hessian, Stop
from graphwright.capture import capture
from graphwright.compiled import CompileOptions, rewrite
from graphwright.engine.tokenizer import Tokenizer
from graphwright.feeding import logits_of
from graphwright.numerics import mean_kl
from graphwright.pass_ import Pass
from graphwright.passes.quantize.gptq import Gptq
from graphwright.program import Program
from graphwright.recipe import Recipe, make_pass
from graphwright.serialize import set_attribute
from graphwright.sources import demo_model, open_model
from graphwright.target import Target
from graphwright.weight_quantizer import Layer

CPU = Target.parse("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="interpreter that has llmcompressor")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers that are kept")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as name:
        program, batches, windows = prepare(Path(name), arguments)
        for method, bits, group in itertools.product(arguments.methods, arguments.bits, arguments.groups):
            options = {"bits": bits, "group_size": group, "head_bits": 0, "embedding_bits": 0}
            made = make_pass({method: options})
            first = ours(program, batches, made)
            second = theirs(program, name, arguments, method, bits, group)
            found = compare(program, (first, second), batches, windows, made)
            rows.append((f"{method} int{bits} g{group}", *found))
            console.print(*rows[-1], sep="   ")
    table = Table(title=f"first {arguments.layers} layers of SmolLM2-135M: ours / LLM Compressor")
    for column in ("method", "layer error", "at most theirs", "KL, held out"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def prepare(folder: Path, arguments: argparse.Namespace) -> tuple[Program, list[dict[str, torch.Tensor]], torch.Tensor]:
    """Writes the shortened model and the tokens for the other side; returns the program, the same tokens, the test."""
    source = open_model(demo_model())
    model, config = source.model, source.model.config
    model.model.layers = model.model.layers[: arguments.layers]
    config.num_hidden_layers = arguments.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: arguments.layers]
    # What the GGUF file says about its own quantization would confuse whoever loads the directory.
    vars(config).pop("quantization_config", None)
    model.save_pretrained(folder / "model")
    batches = calibration.from_text(source.tokenizer_directory, None, arguments.samples, arguments.length)
    save_file({"ids": torch.cat([batch["input_ids"] for batch in batches])}, folder / "tokens.safetensors")
    text = accuracy.built_in_text(held_out=True)
    windows = accuracy.token_windows(Tokenizer(source.tokenizer_directory).encode(text), 256, 8)
    program = rewrite(capture(model), Recipe.load({"passes": []}), CPU, CompileOptions(verify=False))
    return program, batches, windows


def ours(program: Program, batches: list[dict[str, torch.Tensor]], one: Pass) -> Program:
    """The program with its layers, but not its head, rounded by our pass."""
    options = CompileOptions(verify=False, calibration=tuple(batches))
    return rewrite(program, Recipe(passes=(one,)), CPU, options)


def theirs(program: Program, folder: str, arguments: argparse.Namespace, method: str, bits: int, group: int) -> Program:
    """The program with the weights that the other side computes with."""
    script, out = Path(__file__).with_name("llm_compressor.py"), Path(folder) / "out.safetensors"
    inputs = [str(Path(folder) / "model"), str(Path(folder) / "tokens.safetensors")]
    command = [str(arguments.python), "-P", str(script), *inputs, method, str(bits), str(group), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    made, known = program.clone(), program.weights()
    for name, tensor in load_file(out).items():
        if name in known:
            set_attribute(made.module, name, tensor)
    return made


def compare(
    program: Program,
    both: tuple[Program, Program],
    batches: list[dict[str, torch.Tensor]],
    windows: torch.Tensor,
    one: Pass,
) -> tuple[str, str, str]:
    """Layer errors, on how many layers ours is at most theirs, and the divergence of the logits."""
    divergence = [
        sum(mean_kl(logits_of(made, w[None]), logits_of(program, w[None])) for w in windows) / len(windows)
        for made in both
    ]
    kl = " / ".join(f"{value:.4f}" for value in divergence)
    if not isinstance(one, Gptq):
        return "", "", kl
    errors = each_alone(program, both[1], batches, one)
    fewer = sum(ours <= 1.001 * theirs for ours, theirs in errors)
    means = (sum(side) / len(errors) for side in zip(*errors, strict=True))
    return " / ".join(f"{mean:.4f}" for mean in means), f"{fewer} of {len(errors)} layers", kl


def each_alone(
    program: Program, other: Program, batches: list[dict[str, torch.Tensor]], one: Gptq
) -> list[tuple[float, float]]:
    """The errors of each layer but the head, solved by us and as the other program has it, on the same inputs."""
    head, known = structure.head(program), other.weights()
    layers = [
        Layer(node, weight, one.scheme(), False) for node, weight in structure.linears(program) if node is not head
    ]
    stages = calibration.by_input(program, layers)
    errors: list[tuple[float, float]] = []

    def visit(index: int, collected: Hessian) -> dict[fx.Node, torch.Tensor]:
        for layer in stages[index][1]:
            weight = program.weight(layer.weight)
            solved = one.solve(weight, layer.scheme, collected)
            pair = [rounding.output_error(weight, w, collected.matrix) for w in (solved.dense(), known[layer.name])]
            errors.append((pair[0], pair[1]))
        return {}

    stops = [Stop(node, node.name) for node, _ in stages]
    calibration.walk(program, batches, stops, Hessian, visit)
    return errors


if __name__ == "__main__":
    main()
