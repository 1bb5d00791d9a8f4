"""Tiny random-weight models, one per supported family, for capture, rewrite and numerics tests.

Smallest use::

    model = build("llama")
    kwargs = example_inputs("llama", batch=2, length=12)
    exported = torch.export.export(
        model, (), kwargs, dynamic_shapes=dynamic_shapes("llama"), strict=False
    )

The weights are large on purpose (`initializer_range` well above a trained model's, every bias and
norm weight perturbed), so that a dropped bias, a wrong scale or a shifted mask moves the outputs
far beyond any tolerance.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

VOCAB_SIZE = 128
MAX_LENGTH = 512
PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family: which `transformers` class, and the settings that make it tiny.

    Attributes:
        name: The family's name, a key of `FAMILIES`.
        model_class: Name of the class in `transformers`; its `config_class` builds the config.
        config: Settings passed to the config class; never an attention or experts implementation.
        causal: Whether the model continues its own `input_ids` (false for encoders and seq2seq).
        seq2seq: Whether the model also takes `decoder_input_ids`.
        moe: Whether some layer routes tokens to experts.
        listed: Whether the family is one of the twenty in the capture table, not an extra form.
    """

    name: str
    model_class: str
    config: dict[str, Any]
    causal: bool = True
    seq2seq: bool = False
    moe: bool = False
    listed: bool = True


def build(name: str, seed: int = 0, **config_overrides: Any) -> transformers.PreTrainedModel:
    """Build a family's tiny model: eval mode, float32, no cache, the same weights for one seed.

    The process's random state is left as it was. `generate` never stops early on the result
    (its generation config has no end-of-sequence token); pass `use_cache=True` there for speed.

    Args:
        name: A key of `FAMILIES`.
        seed: Seeds every weight.
        **config_overrides: Config settings that replace or extend the family's own.
    """
    family = FAMILIES[name]
    model_class = getattr(transformers, family.model_class)
    config = model_class.config_class(**{**_COMMON, **family.config, **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _perturb_vectors(model)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD_TOKEN_ID
    built: transformers.PreTrainedModel = model.eval()
    return built


def example_inputs(
    name: str, batch: int = 2, length: int = 12, seed: int = 0, padding: str | None = None
) -> dict[str, torch.Tensor]:
    """Random keyword inputs for a family; special tokens never occur except as padding.

    Args:
        name: A key of `FAMILIES`.
        batch: Number of rows.
        length: Tokens per row, padding included.
        seed: Seeds the tokens.
        padding: `"left"` or `"right"` pads row `i` by `i % length` tokens; None pads nothing.
    """
    if padding not in (None, "left", "right"):
        raise ValueError(f"padding must be None, 'left' or 'right', not {padding!r}")
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(EOS_TOKEN_ID + 1, VOCAB_SIZE, (batch, count), generator=generator)

    input_ids = tokens(length)
    attention_mask = torch.ones(batch, length, dtype=torch.int64)
    if padding is not None:
        for row in range(batch):
            count = row % length
            padded = slice(0, count) if padding == "left" else slice(length - count, length)
            attention_mask[row, padded] = 0
            input_ids[row, padded] = PAD_TOKEN_ID
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if FAMILIES[name].seq2seq:
        # A target length of its own, so that source and target symbols cannot be mixed up.
        inputs["decoder_input_ids"] = tokens(max(2, length // 2 + 1))
    return inputs


def dynamic_shapes(name: str) -> dict[str, dict[int, Any]]:
    """`dynamic_shapes` for `torch.export.export` on `example_inputs`: batch and sequence vary."""
    batch = torch.export.Dim("batch")
    # The bound is bert's: it slices its position table, so export refuses an unbounded sequence.
    sequence = torch.export.Dim("sequence", max=MAX_LENGTH if name == "bert" else None)
    shapes = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
    if FAMILIES[name].seq2seq:
        shapes["decoder_input_ids"] = {0: batch, 1: torch.export.Dim("target")}
    return shapes


def _perturb_vectors(model: torch.nn.Module) -> None:
    """Add noise to every bias and norm weight: initialised to 0 or 1 they would hide mistakes."""
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # gpt_oss keeps its experts' biases as [E, N], so one dimension is not the whole test.
            if parameter.ndim == 1 or parameter_name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            # deepseek_v3's router bias is a buffer; it decides which experts are chosen.
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "initializer_range": 0.4,
    "use_cache": False,
}

_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}

_GEMMA: dict[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "sliding_window": 5,  # layers alternate between sliding and full attention
    "query_pre_attn_scalar": 2,
    # The embeddings, multiplied by sqrt(hidden_size), drown the normed branches: tied, they would
    # make the model repeat its last token for ever.
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}

_MLA: dict[str, Any] = {
    **_DECODER,
    "num_hidden_layers": 3,  # one dense layer, then two of experts
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,  # differs from the query's 24, as in the released models
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}

_TABLE = (
    Family("llama", "LlamaForCausalLM", _DECODER),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH},
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "init_std": 0.4,
        },
    ),
    Family("qwen2", "Qwen2ForCausalLM", _DECODER),
    # A head_dim that is not hidden_size / heads, as in the released 0.6B.
    Family("qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 24}),
    Family("mistral", "MistralForCausalLM", {**_DECODER, "sliding_window": 5}),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    Family("phi3", "Phi3ForCausalLM", _DECODER),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        moe=True,
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_DECODER,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        moe=True,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **_DECODER,
            "num_hidden_layers": 3,  # a dense layer between two of experts
            "mlp_only_layers": [1],
            "head_dim": 24,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        moe=True,
    ),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", {**_MLA, "topk_method": "greedy"}, moe=True),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", _MLA, moe=True),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            # The released models rotate a quarter of each head.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "alibi": False,
        },
    ),
    Family(
        "falcon_alibi",
        "FalconForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
        listed=False,
    ),
    # The grouped form of the 40B and later: kv heads, two layer norms.
    Family(
        "falcon_grouped",
        "FalconForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "max_position_embeddings": MAX_LENGTH,
            "alibi": False,
            "new_decoder_architecture": True,
        },
        listed=False,
    ),
    Family("bloom", "BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_DECODER,
            "head_dim": 16,
            # The default yarn table stretches 4096 positions by 32 and scales cos and sin.
            "max_position_embeddings": 131072,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        moe=True,
    ),
    Family(
        "bert",
        "BertForMaskedLM",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
        },
        causal=False,
    ),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "initializer_factor": 3.0,  # t5 has no initializer_range
            "decoder_start_token_id": PAD_TOKEN_ID,
        },
        causal=False,
        seq2seq=True,
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}
