"""SmolLM2's Q4_1 file as it is: the same bits as gguf's, and a program that generates from them."""

import gguf
import pytest
import torch
from interchange.test_gguf import in_file_order

import graphwright
from graphwright import packing
from graphwright.capture import capture
from graphwright.engine.tokenizer import Tokenizer
from graphwright.interchange.packed import PackedEmbedding, PackedLinear
from graphwright.sources import demo_model, open_model


@pytest.mark.real_model
@pytest.mark.slow
def test_the_file_runs_with_its_own_bits():
    source = open_model(demo_model(), keep_codes=True)
    model, checked = source.model, 0
    reader = gguf.GGUFReader(str(demo_model()))
    for tensor in reader.tensors:
        module = packed_module(model, tensor.name)
        if module is None:
            continue
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = packing.dequantize(
            module.weight, module.weight_scale, module.weight_zero_point, module.format, module.group_size
        ).numpy()
        heads = 9 if "attn_q" in tensor.name else 3 if "attn_k" in tensor.name else 0
        assert (in_file_order(found, heads) if heads else found).tobytes() == expected.tobytes(), tensor.name
        checked += 1
    assert checked == 30 * 7 + 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = Tokenizer(str(source.tokenizer_directory))
    compiled = graphwright.compile(capture(model), "as-is", verify=False)
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(compiled.generate([prompt], max_new_tokens=2).tokens[0]).startswith(" Paris")


PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packed_module(model: torch.nn.Module, name: str) -> PackedLinear | PackedEmbedding | None:
    """The module of a tensor in codes, or None for a norm."""
    _, *rest = name.split(".")
    if name == "token_embd.weight":
        return model.model.embed_tokens
    if len(rest) < 3 or rest[1] not in PARTS:
        return None
    return model.get_submodule(f"model.layers.{rest[0]}.{PARTS[rest[1]]}")
