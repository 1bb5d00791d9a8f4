"""GGUF files that llama.cpp and OpenVINO are timed on: SmolLM2 in another type, or a random Llama that we compile too.

    python samples/bench/gguf_models.py smollm2 smollm2-q4_0.gguf --type q4_0
    python samples/bench/gguf_models.py random random-llama --type q4_0

The first rounds the dequantized weights of the demo model again. The second writes a directory that Graphwright and
transformers read, with `model-q4_0.gguf` in it: 0.9 B parameters, hidden 2048, 16 layers, 32 query and 8 key/value
heads, feed-forward 5632, vocabulary 32000. Tokens and merges are the demo model's, as far as the vocabulary goes.
As llama.cpp's own files do, the token table and the head keep 8 bits where the other weights have 4.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM

from graphwright.sources import demo_model

TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {
    gguf.GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
TABLES = ("token_embd.weight", "output.weight")
CONFIG = LlamaConfig(
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=5632,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Tensors = Iterator[tuple[str, numpy.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["smollm2", "random"])
    parser.add_argument("output", type=Path, help="a file for smollm2, a directory for random")
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    arguments = parser.parse_args()
    source = gguf.GGUFReader(demo_model())
    if arguments.model == "smollm2":
        tensors = ((t.name, dequantize(t.data, t.tensor_type)) for t in source.tensors)
        write(arguments.output, fields(source), tensors, TYPES[arguments.type])
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    model.save_pretrained(arguments.output)
    file = arguments.output / f"model-{arguments.type}.gguf"
    write(file, random_fields(source), random_tensors(model), TYPES[arguments.type])


def write(file: Path, metadata: dict[str, Any], tensors: Tensors, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices are rounded to `kind`, tables to 8 bits, vectors stay float32."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(FILE_TYPES[kind])
    for name, (value, types) in metadata.items():
        writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for name, weight in tensors:
        weight = numpy.ascontiguousarray(weight, dtype=numpy.float32)
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            continue
        chosen = gguf.GGMLQuantizationType.Q8_0 if name in TABLES else kind
        writer.add_tensor(name, quantize(weight, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fields(source: gguf.GGUFReader) -> dict[str, Any]:
    """Names to values and types, without what the writer adds itself."""
    skipped = ("GGUF.", "general.architecture", "general.file_type")
    return {n: (f.contents(), f.types) for n, f in source.fields.items() if not n.startswith(skipped)}


def random_fields(source: gguf.GGUFReader) -> dict[str, Any]:
    """The demo model's fields with the sizes of `CONFIG`."""
    found = fields(source)
    sizes = {
        "llama.block_count": CONFIG.num_hidden_layers,
        "llama.context_length": CONFIG.max_position_embeddings,
        "llama.embedding_length": CONFIG.hidden_size,
        "llama.feed_forward_length": CONFIG.intermediate_size,
        "llama.attention.head_count": CONFIG.num_attention_heads,
        "llama.attention.head_count_kv": CONFIG.num_key_value_heads,
        "llama.rope.freq_base": float(CONFIG.rope_parameters["rope_theta"]),
        "llama.vocab_size": CONFIG.vocab_size,
    }
    tokens = found["tokenizer.ggml.tokens"][0][: CONFIG.vocab_size]
    known = set(tokens)
    sizes["tokenizer.ggml.tokens"] = tokens
    sizes["tokenizer.ggml.token_type"] = found["tokenizer.ggml.token_type"][0][: CONFIG.vocab_size]
    merges = found["tokenizer.ggml.merges"][0]
    sizes["tokenizer.ggml.merges"] = [merge for merge in merges if merge.replace(" ", "") in known]
    return found | {name: (value, found[name][1]) for name, value in sizes.items()}


def random_tensors(model: LlamaForCausalLM) -> Tensors:
    """The model's weights by GGUF's names; rotary rows interleaved, as its architecture `llama` has them."""
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"].numpy()
    yield "output_norm.weight", state["model.norm.weight"].numpy()
    yield "output.weight", state["lm_head.weight"].numpy()
    for layer in range(CONFIG.num_hidden_layers):
        for short, name in LAYER.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}.get(short)
            if heads:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            yield f"blk.{layer}.{short}.weight", weight.numpy()


if __name__ == "__main__":
    main()
