"""GGUF files: every block type dequantizes to the same bits, rows come back from llama.cpp's order, tables are tied."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families.configs import build
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel

from graphwright import packing
from graphwright.errors import SourceError
from graphwright.interchange import gguf as reading
from graphwright.interchange.experts import PackedExperts
from graphwright.interchange.packed import PackedEmbedding, PackedLinear
from graphwright.numerics import relative_error
from graphwright.sources import open_model

TYPES = gguf.GGMLQuantizationType
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "Q5_K": [0, 2], "Q5_0": [0]}
"""Where in a block its float16 numbers lie."""

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def blocks(kind: str, rows: int, width: int, seed: int) -> np.ndarray:
    """Random blocks of a type: any bits for codes and inner scales, moderate float16 scales."""
    size, stored = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    generator = np.random.default_rng(seed)
    made = generator.integers(0, 256, (rows, width // size, stored), dtype=np.uint8)
    for place in HALVES[kind]:
        scales = generator.uniform(-0.002, 0.002, (rows, width // size, 1)).astype(np.float16)
        made[..., place : place + 2] = scales.view(np.uint8)
    return made.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(reading.READERS))
@pytest.mark.parametrize("seed", range(3))
def test_blocks_stand_for_the_same_bits(kind, seed):
    made = blocks(kind, 5, 512, seed)
    expected = torch.from_numpy(gguf.dequantize(made, TYPES[kind]))
    stored = gguf.GGML_QUANT_SIZES[TYPES[kind]][1]
    packed = reading.READERS[kind](made.reshape(5, -1, stored)).packed()
    assert torch.equal(packed.dense(), expected)


def in_file_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key weight as llama.cpp has them: the halves of each head by turns."""
    size = weight.shape[0] // heads
    order = [
        head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def write(file: Path, kinds: dict[str, str], *, tied: bool, family: str = "llama") -> PreTrainedModel:
    """A tiny file whose tensors have the types `kinds` by the end of their name, and the model that it stands for."""
    model = build(family, hidden_size=256, intermediate_size=512, num_hidden_layers=1, tie_word_embeddings=tied)
    config = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        stored, kind = file_name(name), next((k for end, k in kinds.items() if name.endswith(f"{end}.weight")), "F32")
        if kind == "F32":
            writer.add_tensor(stored, tensor.numpy())
            continue
        made = blocks(kind, *tensor.shape, seed)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if family == "llama" else None
        writer.add_tensor(stored, made if count is None else in_file_order(made, count), raw_dtype=TYPES[kind])
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(gguf.dequantize(made, TYPES[kind])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(file.parent / "tokenizer.json"))
    return model


def file_name(name: str) -> str:
    """The name of a model's tensor in a file."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed or name == "lm_head.weight":
        return fixed.get(name, "output.weight")
    path, _, part = name.removeprefix("model.layers.0.").rpartition(".")
    return f"blk.0.{NAMES[path]}.{part}"


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


EXPERTS = ("gate_exps", "up_exps", "down_exps")


def write_mixture(file: Path, kinds: dict[str, str]) -> PreTrainedModel:
    """A tiny mixture whose experts, each part in a tensor of its own, have the types `kinds`; and the same model.

    The width of experts is the one that transformers takes for granted: it does not read it from files.
    """
    inner = 768
    sizes = {"moe_intermediate_size": inner, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}
    model = build("qwen3_moe", hidden_size=256, num_hidden_layers=1, **sizes)
    config = model.config
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_count(4)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    stacks = {"gate_exps": (0, inner), "up_exps": (inner, 2 * inner)}
    experts = model.model.layers[0].mlp.experts
    for seed, (part, kind) in enumerate(kinds.items()):
        shape = (inner, 256) if part in stacks else (256, inner)
        made = np.stack([blocks(kind, *shape, 10 * seed + e) for e in range(4)])
        writer.add_tensor(f"blk.0.ffn_{part}.weight", made, raw_dtype=TYPES[kind])
        dense = torch.from_numpy(gguf.dequantize(made, TYPES[kind]))
        with torch.no_grad():
            if part in stacks:
                experts.gate_up_proj[:, slice(*stacks[part])] = dense
            else:
                experts.down_proj.copy_(dense)
    names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp"}
    for name, tensor in model.state_dict().items():
        if "experts" not in name:
            path, _, part = name.removeprefix("model.layers.0.").rpartition(".")
            writer.add_tensor(f"blk.0.{names[path]}.{part}" if path in names else file_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(file.parent / "tokenizer.json"))
    return model


def test_experts_keep_the_codes_of_their_blocks(tmp_path):
    reference = write_mixture(tmp_path / "tiny.gguf", dict.fromkeys(EXPERTS, "Q8_0"))
    source = open_model(tmp_path / "tiny.gguf", tokenizer=tmp_path, keep_codes=True)
    assert source.notes == ("its codes are kept (gguf, Q8_0)",)
    experts = source.model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    for name in ("gate_up_proj", "down_proj"):
        parts = (getattr(experts, f"{name}_{part}") for part in ("int8", "scale"))
        for e, (codes, scale) in enumerate(zip(*parts, strict=True)):
            dense = packing.dequantize(codes, scale, None, "int8", 32)
            assert torch.equal(dense, getattr(reference.model.layers[0].mlp.experts, name)[e])
    assert relative_error(logits(source.model), logits(reference)) < 1e-5


def test_experts_in_several_types_are_dequantized_and_said_to_be(tmp_path):
    kinds = dict(zip(EXPERTS, ("Q4_K", "Q4_K", "Q6_K"), strict=True))
    reference = write_mixture(tmp_path / "tiny.gguf", kinds)
    source = open_model(tmp_path / "tiny.gguf", tokenizer=tmp_path, keep_codes=True)
    assert source.notes[1].endswith("their first product is in int4_offset and the second in int8")
    assert relative_error(logits(source.model), logits(reference)) < 1e-5


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("family", "tied", "kinds"),
    [
        ("llama", True, {**dict.fromkeys(LINEAR, "Q4_1"), "embed_tokens": "Q8_0"}),
        (
            "llama",
            False,
            {**dict.fromkeys(LINEAR, "Q4_K"), "v_proj": "Q6_K", "lm_head": "Q6_K", "embed_tokens": "Q4_K"},
        ),
        ("llama", True, {**dict.fromkeys(LINEAR, "Q8_0"), "down_proj": "Q4_0"}),
        ("qwen2", False, {**dict.fromkeys(LINEAR, "Q4_0"), "lm_head": "Q8_0"}),
    ],
    ids=["q4_1 tied", "q4_k_m", "q8_0 with a tied table in floats", "qwen2"],
)
def test_a_file_equals_the_model_it_stands_for(tmp_path, family, tied, kinds):
    file = tmp_path / "tiny.gguf"
    reference = write(file, kinds, tied=tied, family=family)
    source = open_model(file, tokenizer=tmp_path, keep_codes=True)
    model = source.model
    held = {n: m for n, m in model.named_modules() if isinstance(m, (PackedLinear, PackedEmbedding))}
    assert len(held) == len(LINEAR) + ("embed_tokens" in kinds) + (
        "lm_head" in kinds or (tied and "embed_tokens" in kinds)
    )
    if tied and "embed_tokens" in kinds:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative_error(logits(model), logits(reference)) < 1e-5
    assert source.notes == (f"its codes are kept (gguf, {', '.join(dict.fromkeys(order(kinds, family, tied)))})",)
    floats = open_model(file, tokenizer=tmp_path)
    assert "quantized already (gguf, " in floats.notes[0]
    assert all(torch.equal(t, floats.model.state_dict()[n]) for n, t in reference.state_dict().items())


def order(kinds: dict[str, str], family: str, tied: bool) -> list[str]:
    """Block types in the order of a file."""
    names = build(family, num_hidden_layers=1, tie_word_embeddings=tied).state_dict()
    return [kind for name in names for end, kind in kinds.items() if name.endswith(f"{end}.weight")]


def test_other_types_are_dequantized_and_said_to_be(tmp_path):
    file = tmp_path / "tiny.gguf"
    reference = write(file, {**dict.fromkeys(LINEAR, "Q4_0"), "up_proj": "Q5_0", "down_proj": "Q5_K"}, tied=True)
    source = open_model(file, tokenizer=tmp_path, keep_codes=True)
    assert source.notes[1:] == (
        "1 tensors of type Q5_0 were dequantized, the first is model.layers.0.mlp.up_proj.weight",
        "1 tensors of type Q5_K were dequantized, the first is model.layers.0.mlp.down_proj.weight",
    )
    assert isinstance(source.model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert relative_error(logits(source.model), logits(reference)) < 1e-5


def test_a_truncated_file_is_damaged(tmp_path):
    file = tmp_path / "tiny.gguf"
    write(file, dict.fromkeys(LINEAR, "Q4_0"), tied=True)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(SourceError, match="cannot be read"):
        open_model(file, tokenizer=tmp_path, keep_codes=True)
