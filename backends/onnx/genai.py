"""The file beside the model from which onnxruntime-genai learns how to run it: `genai_config.json`."""

import json
from pathlib import Path
from typing import Any

from graphwright.backends.onnx.model import MODEL
from graphwright.backends.onnx.naming import tensor_name
from graphwright.ops import attention
from graphwright.program import Program

CONFIG = "genai_config.json"

TYPE = "llama"
"""Stands for every decoder whose inputs are tokens, mask, positions and past; nothing else follows from it."""


def layers(program: Program) -> tuple[int, int, int, int] | None:
    """Heads, key-value heads, head_dim and layers, or None where caches differ in shape and genai cannot make them."""
    nodes = list(program.calls(attention.target))
    caches = set()
    for node in nodes:
        query, key, value = (argument.meta["val"].shape for argument in node.args[:3])
        caches.add((int(query[1]), int(key[1]), int(key[3]), int(value[3])))
    if len(caches) != 1:
        return None
    ((heads, kv_heads, head_dim, value_dim),) = caches
    return (heads, kv_heads, head_dim, len(nodes)) if head_dim == value_dim else None


def write_config(program: Program, directory: Path, *, in_place: bool) -> bool:
    """Writes the configuration, or returns False where the program's caches have no place in one.

    Args:
        program: with explicit caches.
        directory: where the model lies.
        in_place: whether present tensors may be the past tensors' own memory.
    """
    found = layers(program)
    if found is None:
        return False
    (directory / CONFIG).write_text(json.dumps(_config(program, *found, in_place=in_place), indent=1))
    return True


def _config(
    program: Program, heads: int, kv_heads: int, head_dim: int, count: int, *, in_place: bool
) -> dict[str, Any]:
    metadata = program.metadata
    plain = {"token": "input_ids", "attention_mask": "attention_mask", "position": "position_ids"}
    inputs = {plain[spec.role]: tensor_name(spec.name) for spec in program.contract.inputs if spec.role in plain}
    end = list(metadata.eos_token_ids)
    pad = metadata.pad_token_id if metadata.pad_token_id is not None else (end or [0])[0]
    cache = {f"{kind}_names": f"{kind.replace('past_', 'past_key_values.%d.')}" for kind in ("past_key", "past_value")}
    present = {f"{kind}_names": kind.replace("present_", "present.%d.") for kind in ("present_key", "present_value")}
    return {
        "model": {
            "type": TYPE,
            "bos_token_id": metadata.bos_token_id if metadata.bos_token_id is not None else pad,
            "eos_token_id": end or pad,
            "pad_token_id": pad,
            "vocab_size": metadata.vocab_size,
            "context_length": metadata.context_length,
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_size": head_dim,
                "hidden_size": heads * head_dim,
                "num_hidden_layers": count,
                "inputs": {**inputs, **cache},
                "outputs": {"logits": "logits", **present},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": metadata.context_length,
            "num_beams": 1,
            "past_present_share_buffer": in_place,
        },
    }
