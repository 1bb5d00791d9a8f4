"""Quantizes a model directory with LLM Compressor; run by `quantizers.py` in an environment that has the package.

    python llm_compressor.py MODEL TOKENS.safetensors gptq 4 64 OUT.safetensors

TOKENS holds `ids` [samples, length]. OUT gets every parameter as the quantized model computes with it.
"""

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, tokens, method, bits, group, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(tokens)["ids"]
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    weights = QuantizationArgs(
        num_bits=int(bits), type="int", symmetric=False, strategy="group", group_size=int(group), actorder=None
    )
    scheme = {"own": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = {
        "rtn": [QuantizationModifier(config_groups=scheme, ignore=["lm_head"])],
        "gptq": [GPTQModifier(config_groups=scheme, ignore=["lm_head"], actorder="static", dampening_frac=0.01)],
        "awq": [AWQModifier(), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])],
    }[method]
    # Version 0.14.0.1 pins memory for a GPU that need not be there, and then stops.
    IntermediatesCache.pin_memory = lambda *_arguments: None
    # A processor is asked for though the tokens are there; nothing is called on it.
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=None),
        processor=object(),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(rows),
        log_dir=None,
    )
    save_file(effective(model), out)


def effective(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, weights rounded as the forward would."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = {name: tensor for name, tensor in found.items() if name.endswith(("weight", "bias"))}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            kept[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights).detach()
    return {name: tensor.contiguous() for name, tensor in kept.items()}


if __name__ == "__main__":
    main()
