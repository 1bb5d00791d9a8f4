"""The format `onnx`: one model for prefill and decode, in a directory that onnxruntime-genai and Optimum read.

graphwright export MODEL --format onnx --recipe int4 --set profile=ort -o DIR

model.onnx, model.onnx.data   the graph, and its weights beside it
genai_config.json             how onnxruntime-genai runs it
tokenizer files               if the model has a tokenizer
manifest.json                 versions, recipe, and the size and SHA-256 of every file
"""

import shutil
from typing import Any

import numpy as np
import torch

from graphwright import ops
from graphwright.backends.onnx import model as files
from graphwright.backends.onnx import ort
from graphwright.backends.onnx.genai import write_config
from graphwright.backends.onnx.options import OnnxOptions
from graphwright.backends.onnx.runtime import Session, import_runtime, padded_batch
from graphwright.errors import RecipeError
from graphwright.export_format import Export, Format, Verified, compare, error_limit
from graphwright.numerics import relative_error
from graphwright.pass_ import Pass
from graphwright.recipe import Recipe, make_pass

REPLACED = {"kv_cache", "selected_logits"}
"""Properties whose passes give way to explicit caches and the logits of every token."""

SPARSE = {"compressed_sparse"}
"""Properties whose passes store weights without their zeros."""

LEFT_OUT = REPLACED | {"experts"}
"""Properties whose passes are not run: experts are written as products of sorted rows."""

VERIFY_TOKENS = 33


class Onnx(Format):
    """Writes programs as ONNX."""

    name = "onnx"
    options = OnnxOptions

    def require(self, options: Any, *, verify: bool) -> None:
        """Refuses verification where nothing runs the model.

        Raises:
            BackendError: ONNX Runtime is missing.
        """
        if verify:
            import_runtime()

    def recipe(self, recipe: Recipe, options: Any) -> Recipe:
        """The recipe with explicit caches instead of caches in place, and codes with their zeros.

        Raises:
            RecipeError: a pass needs what ONNX cannot carry.
        """
        if any("quantized" in one.provides for one in recipe.passes):
            # Codes stand for zeros too, and take less than the zeros of a dense weight in floating point.
            passes = tuple(one for one in recipe.passes if not SPARSE & set(one.provides))
            recipe = recipe.model_copy(update={"passes": passes})
        for one in recipe.passes:
            _refuse_format(one, options)
            if REPLACED & set(one.requires):
                raise RecipeError(
                    f"Pass {one.name} works on caches in place, and the caches of an ONNX model are inputs and outputs",
                    fix="Use a recipe without it",
                )
            if LEFT_OUT & set(one.requires):
                raise RecipeError(
                    f"Pass {one.name} works on experts as one op, and an ONNX model has their products",
                    fix="Use a recipe without it",
                )
        kept = [one for one in recipe.passes if not LEFT_OUT & set(one.provides)]
        cached = any(REPLACED & set(one.provides) for one in recipe.passes)
        return recipe.model_copy(update={"passes": (*kept, *([make_pass("explicit_cache")] if cached else []))})

    def write(self, export: Export) -> dict[str, Any]:
        """The model with its weights, the tokenizer's files, and the configuration for onnxruntime-genai.

        Raises:
            RefusalError: the program holds what the profile cannot carry.
        """
        program, options = export.program, export.options
        export.progress("translate to ONNX", 0.6)
        built = files.build(program, options)
        export.progress("write", 0.8)
        files.save(built, export.directory)
        if export.tokenizer is not None:
            shutil.copytree(export.tokenizer, export.directory, dirs_exist_ok=True)
        fitting = options.profile == "ort" and all(map(ort.fits, program.calls(ops.attention.target)))
        genai = write_config(program, export.directory, in_place=fitting)
        return {"nodes": built.graph.num_nodes(), "genai": genai}

    def verify(self, export: Export) -> Verified:
        """Runs what was written on ONNX Runtime and compares the outputs; with caches, of a prefill and a decode step.

        Raises:
            BackendError: ONNX Runtime does not run the model.
        """
        program = export.program
        if not any(spec.name == "key_mask" for spec in program.contract.inputs):
            session = Session(export.directory)
            return compare(program, session, session.runtime)
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
        limit = error_limit(program, (expected,))
        # Its weights make room for those of the file.
        export.program = program = program.shape_only()
        session = Session(export.directory)
        held, parts = session.empty_past(2), []
        for start, end in ((0, length - 1), (length - 1, length)):
            logits, held = session.step(ids[:, start:end].numpy(), mask[:, :end].numpy(), held)
            parts.append(logits)
        found = torch.from_numpy(np.concatenate(parts, 1))
        kept = mask.bool()
        _, seconds = session.greedy(ids[0].tolist(), VERIFY_TOKENS)
        error = relative_error(found[kept], expected[kept])
        return Verified(error, 1 / seconds, session.runtime, limit)


def _refuse_format(one: Pass, options: OnnxOptions) -> None:
    """Refuses, before any work, a pass whose options ask for weights that the file cannot hold."""
    for format in one.weight_formats:
        refusal = options.refusal(format)
        if refusal:
            raise RecipeError(refusal[0], where=f"pass {one.spec()}", fix=refusal[1])
    if SPARSE & set(one.provides) and not options.decompose:
        raise RecipeError(
            "ONNX has no form for weights without their zeros",
            where=f"pass {one.name}",
            fix="Leave the pass out, or set decompose=true, which writes the zeros in full",
        )


FORMAT = Onnx()
