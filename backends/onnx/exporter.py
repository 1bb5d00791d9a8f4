"""The format `onnx`: one model for prefill and decode, in a directory that onnxruntime-genai and Optimum read.

graphwright export MODEL --format onnx --recipe int4 --set profile=ort -o DIR

model.onnx, model.onnx.data   the graph, and its weights beside it
genai_config.json             how onnxruntime-genai runs it
tokenizer files               if the model has a tokenizer
manifest.json                 versions, recipe, and the size and SHA-256 of every file
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from graphwright import ops
from graphwright.backend import Progress
from graphwright.backends.onnx import model as files
from graphwright.backends.onnx import ort
from graphwright.backends.onnx.genai import write_config
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.quantized import FOUR_BIT_OPSET
from graphwright.backends.onnx.runtime import Session, padded_batch
from graphwright.errors import BackendError, RecipeError
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.origin import Origin
from graphwright.pass_ import Pass
from graphwright.program import Program
from graphwright.recipe import Recipe, make_pass

CARRIED = {"ort": ("int8", "int4"), "standard": ("int8", "int4"), "tensorrt": ("int8", "int4", "fp8_e4m3")}
"""Weight formats that each profile has a form for."""

REPLACED = {"kv_cache", "selected_logits"}
"""Properties whose passes give way to explicit caches and the logits of every token."""

LEFT_OUT = REPLACED | {"experts"}
"""Properties whose passes are not run: experts are written as products of sorted rows."""

VERIFY_TOKENS = 33


class OnnxExporter:
    """Writes programs as ONNX."""

    name = "onnx"
    options: type[BaseModel] = OnnxOptions

    def recipe(self, recipe: Recipe, options: Any) -> Recipe:
        """The recipe with explicit caches instead of caches in place.

        Raises:
            RecipeError: a pass needs what ONNX cannot carry.
        """
        for one in recipe.passes:
            _refuse_format(one, options)
            if REPLACED & set(one.requires):
                raise RecipeError(
                    f"Pass {one.name} works on caches in place, and the caches of an ONNX model are inputs and outputs",
                    fix="Use a recipe without it",
                )
        kept = [one for one in recipe.passes if not LEFT_OUT & set(one.provides)]
        cached = any(REPLACED & set(one.provides) for one in recipe.passes)
        return recipe.model_copy(update={"passes": (*kept, *([make_pass("explicit_cache")] if cached else []))})

    def write(
        self, program: Program, directory: Path, origin: Origin, options: Any, progress: Progress
    ) -> dict[str, Any]:
        """Writes everything but the manifest into an existing directory.

        Raises:
            BackendError: the program holds what the profile cannot carry.
        """
        for node in program.calls(ops.quantized_linear.target, ops.quantized_embedding.target):
            _require_carried(str(argument(node, "format")), options)
        progress("translate", 0.0)
        built = files.build(program, options)
        progress("write", 0.5)
        files.save(built, directory)
        if origin.tokenizer is not None:
            shutil.copytree(origin.tokenizer, directory, dirs_exist_ok=True)
        fitting = options.profile == "ort" and all(map(ort.fits, program.calls(ops.attention.target)))
        genai = write_config(program, directory, in_place=fitting)
        return {"nodes": built.graph.num_nodes(), "genai": genai, **options.model_dump()}

    def verify(self, program: Program, directory: Path) -> dict[str, float]:
        """Runs what was written on ONNX Runtime: largest relative error of the logits against `program`, and speed.

        Raises:
            BackendError: ONNX Runtime is missing or does not run the model.
        """
        if not any(spec.name == "key_mask" for spec in program.contract.inputs):
            raise BackendError("Only language models with caches can be verified", fix="Use a recipe with static_cache")
        session = Session(directory)
        ids, mask = padded_batch(program.metadata.vocab_size)
        length = ids.shape[1]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "key_mask": mask, "positions": places}
        past = {
            spec.name: torch.zeros((2, spec.shape[1], 0, spec.shape[3]), dtype=spec.dtype)
            for spec in program.contract.inputs
            if spec.name.startswith("past_")
        }
        taken = {name: tensor for name, tensor in inputs.items() if name in program.contract.names}
        expected = program(**taken, **past)[0]
        held, parts = session.empty_past(2), []
        for start, end in ((0, length - 1), (length - 1, length)):
            logits, held = session.step(ids[:, start:end].numpy(), mask[:, :end].numpy(), held)
            parts.append(logits)
        found = torch.from_numpy(np.concatenate(parts, 1))
        kept = mask.bool()
        _, seconds = session.greedy(ids[0].tolist(), VERIFY_TOKENS)
        return {"relative_error": relative_error(found[kept], expected[kept]), "tokens_per_second": 1 / seconds}


def _refuse_format(one: Pass, options: OnnxOptions) -> None:
    """Refuses, before any work, a pass whose options ask for codes that the file cannot hold."""
    if "quantized" not in one.provides:
        return
    for name, value in one.model_dump().items():
        if name == "format" or name.endswith("_format"):
            _require_carried(str(value), options, where=f"option {name} of pass {one.name}")
        elif (name == "bits" or name.endswith("_bits")) and value:
            _require_carried(f"int{value}", options, where=f"option {name} of pass {one.name}")


def _require_carried(format: str, options: OnnxOptions, where: str = "") -> None:
    carried = CARRIED[options.profile]
    if format not in carried:
        raise RecipeError(
            f"Profile {options.profile} of ONNX cannot carry weights of format {format}",
            where=where,
            fix=f"It carries {', '.join(carried)}",
        )
    narrow = options.profile == "standard" and options.opset < FOUR_BIT_OPSET and not options.wide_codes
    if format == "int4" and narrow:
        raise RecipeError(
            f"Opset {options.opset} of ai.onnx has no 4-bit type",
            where=where,
            fix="Set opset=24 or profile=ort, or wide_codes=true, which stores each code in 8 bits",
        )


EXPORTER = OnnxExporter()
