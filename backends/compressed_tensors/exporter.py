"""The format `compressed-tensors`: a Hugging Face directory that `transformers` and vLLM load.

graphwright export MODEL --format compressed-tensors --recipe int4 -o DIR

config.json               the model's own, with `quantization_config`
model.safetensors         codes and scales of quantized layers, everything else in floating point
generation_config.json, tokenizer files
manifest.json             versions, recipe, and the size and SHA-256 of every file

The model's own modules are written: passes that merge layers or add caches are left out, and so are codes for the
vocabulary head and the token embedding, which the readers keep in floating point. Experts are written one by one, see
`experts`. `transformers` needs the package
`compressed-tensors` for reading: a version before 0.18, since later ones lose the zero points of packed codes when
`transformers` loads them without `dequantize=True`. vLLM reads them itself.

Dynamic rounding of activations to 8 bits is the same in vLLM and here: the largest magnitude of a token becomes code
127. The Python package divides by 127.5 in its place, so that its logits differ by the rounding of an activation.
"""

import importlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from graphwright import ops, packing
from graphwright.backends.compressed_tensors.experts import (
    TARGETS,
    buffers,
    empty_model,
    stacks_in_codes,
    stored_names,
    write_experts,
)
from graphwright.backends.compressed_tensors.layers import CARRIED, Written, write_layer
from graphwright.contract import DTYPES
from graphwright.errors import BackendError, RecipeError
from graphwright.export_format import Export, Format, FormatOptions, Verified, error_limit
from graphwright.match import argument
from graphwright.numerics import relative_error
from graphwright.origin import Origin
from graphwright.pass_ import Pass
from graphwright.program import Program, unshared
from graphwright.recipe import Recipe
from graphwright.scheme import LayerOptions
from graphwright.weight_quantizer import WeightQuantizer

LEFT_OUT = {"merged_linear", "kv_cache", "selected_logits"}
"""Properties whose passes are not run: they change how the model is laid out, not its numbers."""

BESIDE = ("experts", "smoothquant", "activations", "magnitude", "wanda", "sparsegpt")
"""Passes that do not round weights, and whose results are the model's own tensors and a rounding of inputs."""

CARRIES = f"It carries weights in {', '.join(CARRIED)} with zero points in codes, and {', '.join(BESIDE)}"


class CompressedTensorsOptions(FormatOptions):
    """Options of the format."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="of scales and of what is not quantized; float32 keeps the program's numbers"
    )


class CompressedTensors(Format):
    """Writes programs as compressed-tensors directories."""

    name = "compressed-tensors"
    options = CompressedTensorsOptions

    def require(self, options: Any, *, verify: bool) -> None:
        """Refuses verification where nothing reads the format.

        Raises:
            BackendError: transformers or the package compressed-tensors is missing.
        """
        for package in READERS if verify else ():
            if importlib.util.find_spec(package) is None:
                raise BackendError(
                    f"The package {package}, which reads the format, is not installed",
                    fix="pip install 'graphwright[compressed-tensors]'",
                )

    def recipe(self, recipe: Recipe, options: Any) -> Recipe:
        """The recipe without passes that change the layout, and with head and embedding in floating point.

        Raises:
            RecipeError: a pass makes what the format cannot carry, or none makes codes.
        """
        kept = [_carried(one) for one in recipe.passes if not LEFT_OUT & set(one.provides)]
        if not any("quantized" in one.provides for one in kept):
            raise RecipeError(
                f"Recipe {recipe.name} quantizes no weights, so there is nothing for compressed-tensors to carry",
                fix="Use one that does, such as int4; a model in floating point needs no export",
            )
        return recipe.model_copy(update={"passes": tuple(kept)})

    def write(self, export: Export) -> dict[str, Any]:
        """Config, weights and the tokenizer's files.

        Raises:
            BackendError: the model is none of `transformers`, or the program holds what its modules have no place for.
        """
        program, origin, directory = export.program, export.origin, export.directory
        if export.config is None:
            raise BackendError("Only models of transformers have a config.json to write", fix="Give such a model")
        _refuse_stacks(program, origin)
        dtype, stacks = DTYPES[export.options.dtype], stacks_in_codes(program)
        layers, mixture = _layers(program, origin, dtype), list[Written]()
        floats = _floats(program, origin, {one.module for one in layers}, set(stacks), dtype)
        if stacks:
            model = empty_model(origin.class_name, export.config)
            floats |= buffers(program, model)
            plain, names = stored_names(model, floats, stacks)
            mixture = write_experts(program, names, dtype)
            floats = {plain[name]: tensor for name, tensor in floats.items()}
        tensors = {f"{one.module}.{name}": t for one in (*layers, *mixture) for name, t in one.tensors.items()}
        export.progress("write", 0.8)
        save_file(unshared(tensors | floats), directory / "model.safetensors", {"format": "pt"})
        groups, ignore = _groups(layers, mixture, origin)
        described = {
            # A model that was built from its class alone does not know what it is called.
            "architectures": [origin.class_name],
            "dtype": export.options.dtype,
            "quantization_config": _quantization(groups, ignore),
        }
        _write_json(directory / "config.json", {**export.config, **described})
        if origin.generation_config is not None:
            _write_json(directory / "generation_config.json", origin.generation_config)
        if export.tokenizer is not None:
            shutil.copytree(export.tokenizer, directory, dirs_exist_ok=True)
        return {"layers": len(layers) + len(mixture), "groups": len(groups)}

    def verify(self, export: Export) -> Verified:
        """Loads what was written with `transformers` and compares the logits.

        Raises:
            BackendError: transformers or the package compressed-tensors is missing.
        """
        program = export.program
        transformers, package = (importlib.import_module(name) for name in READERS)
        model = transformers.AutoModelForCausalLM.from_pretrained(export.directory, dtype="auto").eval()
        ids = torch.randint(program.metadata.vocab_size, (1, VERIFY_TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = program(**{name: tensor for name, tensor in given.items() if name in program.contract.names})[0]
        runtime = f"transformers {transformers.__version__}, compressed-tensors {package.__version__}"
        error = relative_error(found.float(), expected.float())
        return Verified(error, None, runtime, error_limit(program, (found,)))


def _quantization(groups: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    return {
        "quant_method": "compressed-tensors",
        "format": _overall(groups),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


READERS = ("transformers", "compressed_tensors")
"""Packages that read the format."""

VERIFY_TOKENS = 33


def _carried(one: Pass) -> Pass:
    """The pass as the format can carry it; refused otherwise."""
    provides = set(one.provides)
    if one.reads_codes or (one.name in BESIDE and "quantized" not in provides):
        return one
    if not isinstance(one, WeightQuantizer) or provides != {"quantized"}:
        raise RecipeError(f"compressed-tensors cannot carry what pass {one.name} makes", fix=CARRIES)
    own = (type(one).compensate, type(one).install, type(one).restore)
    if own != (WeightQuantizer.compensate, WeightQuantizer.install, WeightQuantizer.restore):
        raise RecipeError(
            f"Pass {one.name} stores weights in a form of its own, which compressed-tensors cannot carry", fix=CARRIES
        )
    for pattern, options in {"": LayerOptions(), **one.layers}.items():
        scheme = options.apply(one.scheme())
        if scheme is not None and (scheme.format not in CARRIED or scheme.zero_dtype != "code"):
            zeros = "" if scheme.zero_dtype == "code" else " with fractional zero points"
            where = f"layers {pattern} of pass {one.name}" if pattern else f"pass {one.name}"
            raise RecipeError(
                f"compressed-tensors cannot carry weights in {scheme.format}{zeros}", where=where, fix=CARRIES
            )
    return one.model_copy(update={"head_bits": 0, "embedding_bits": 0})


def _layers(program: Program, origin: Origin, dtype: torch.dtype) -> list[Written]:
    """The quantized layers, each once; a head that shares its codes with the embedding stays in floating point."""
    tables = {str(argument(node, "weight").target) for node in program.calls(ops.quantized_embedding.target)}
    found: dict[str, Written] = {}
    for node in program.calls(ops.quantized_linear.target):
        if str(argument(node, "weight").target) in tables:
            continue
        made = write_layer(program, node, dtype)
        if made.module not in origin.linears:
            raise BackendError(
                f"The program multiplies with the codes {argument(node, 'weight').target}, for which the model has no "
                "linear layer",
                fix="Use a recipe that only rounds weights",
            )
        source = argument(node, "x")
        source = argument(source, "x") if source.target == ops.quantize_dequantize.target else source
        if source.target == torch.ops.aten.index_select.default:
            raise BackendError(
                f"{made.module} gathers its input, as GPTQ with act-order does, and compressed-tensors does not",
                fix="Export the original model with the recipe int4-gptq",
            )
        found.setdefault(made.module, made)
    return list(found.values())


def _floats(
    program: Program, origin: Origin, quantized: set[str], stacks: set[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every parameter that is not in codes, as those of layers and stacks of experts are, under the first of its names.

    Raises:
        BackendError: the program lacks one, or reads a weight that the model has no parameter for.
    """
    tables, weights = _tables(program), program.weights()
    made: dict[str, Tensor] = {}
    left = set(weights) - origin.constants - _read_by_codes(program)
    for names in (*origin.parameters, *((f"{module}.weight",) for module in tables)):
        in_codes = any(name.rpartition(".")[0] in quantized and name.endswith(".weight") for name in names)
        if in_codes or not stacks.isdisjoint(names):
            continue
        found = [name for name in left if any(re.fullmatch(rf"{re.escape(alias)}(_\d+)?", name) for alias in names)]
        module = names[0].rpartition(".")[0]
        if module in tables:
            made[names[0]] = tables[module].to(dtype)
        elif len(found) == 1:
            made[names[0]] = weights[found[0]].to(dtype)
            left.remove(found[0])
        else:
            reads = f"reads it as {', '.join(sorted(found))}" if found else "does not read it"
            raise BackendError(
                f"Parameter {names[0]} of the model has no single value any more: the program {reads}",
                fix="Use a recipe that only rounds weights",
            )
    if left:
        raise BackendError(
            f"The program reads {sorted(left)[0]}, for which the model has no parameter",
            fix="Use a recipe that only rounds weights",
        )
    return made


def _refuse_stacks(program: Program, origin: Origin) -> None:
    """Refuses parameters of more than two dimensions in floating point, which are the stacked weights of experts."""
    codes = _read_by_codes(program)
    for name, tensor in program.weights().items():
        if tensor.dim() > 2 and name not in origin.constants and name not in codes:
            raise BackendError(
                f"{name} holds the weights of experts in floating point, which its readers do not expect beside codes",
                fix="Quantize them too, by a recipe with the pass experts and without exceptions for them",
            )


def _read_by_codes(program: Program) -> set[str]:
    """Names of what quantized layers, tables, experts and roundings read, but for the biases of layers."""
    names = set()
    for node in program.calls(
        ops.quantized_linear.target,
        ops.quantized_embedding.target,
        ops.quantized_experts.target,
        ops.quantize_dequantize.target,
    ):
        bias = argument(node, "bias") if node.target == ops.quantized_linear.target else None
        names |= {str(s.target) for s in node.all_input_nodes if s.op == "get_attr" and s is not bias}
    return names


def _tables(program: Program) -> dict[str, Tensor]:
    """Token embeddings that a checkpoint holds in codes, dequantized, by module."""
    found = {}
    for node in program.calls(ops.quantized_embedding.target):
        parts = [argument(node, part) for part in ("weight", "scale", "zero_point")]
        packed, scale, zero = (None if part is None else program.weight(part) for part in parts)
        dense = packing.dequantize(
            packed, scale, zero, str(argument(node, "format")), int(argument(node, "group_size"))
        )
        found[str(parts[0].target).rpartition(".")[0]] = dense[:, : int(argument(node, "embedding_dim"))]
    return found


def _groups(layers: list[Written], mixture: list[Written], origin: Origin) -> tuple[dict[str, Any], list[str]]:
    """Groups of the config, one per scheme, and the linear layers that stay in floating point.

    Experts that are stored in another way than all other layers have a group of their own, with an expression for
    target, by which transformers finds it.
    """
    schemes: dict[str, list[Written]] = {}
    for one in layers:
        schemes.setdefault(json.dumps(one.scheme, sort_keys=True), []).append(one)
    alike = not mixture or schemes.keys() == {json.dumps(mixture[0].scheme, sort_keys=True)}
    groups = {}
    for number, members in enumerate(schemes.values()):
        targets = ["Linear"] if len(schemes) == 1 and alike else [one.module for one in members]
        groups[f"group_{number}"] = {"targets": targets, **members[0].scheme}
    if not alike:
        groups[f"group_{len(groups)}"] = {"targets": [TARGETS], **mixture[0].scheme}
    quantized = {one.module for one in layers}
    return groups, [name for name in origin.linears if name not in quantized]


def _overall(groups: dict[str, Any]) -> str:
    forms = {group["format"] for group in groups.values()}
    return forms.pop() if len(forms) == 1 else "mixed-precision"


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n")


FORMAT = CompressedTensors()
