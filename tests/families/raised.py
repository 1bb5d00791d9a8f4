"""What raising finds in each family: how many of each semantic op, and what its attentions are."""

from torch import fx

from graphwright.match import argument

OPS = ("attention", "rope", "rms_norm", "gated_activation", "linear", "grouped_linear")

RAISED: dict[str, tuple[int, ...]] = {
    "llama": (2, 4, 5, 2, 15, 0),
    "gpt2": (2, 0, 0, 0, 9, 0),
    "opt": (2, 0, 0, 0, 13, 0),
    "qwen2": (2, 4, 5, 2, 15, 0),
    "qwen3": (2, 4, 9, 2, 15, 0),
    "mistral": (2, 4, 5, 2, 15, 0),
    "gemma2": (2, 4, 9, 2, 15, 0),
    "gemma3": (3, 6, 19, 3, 22, 0),
    "phi3": (2, 4, 5, 2, 9, 0),
    "mixtral": (2, 4, 5, 2, 11, 4),
    "qwen2_moe": (2, 4, 5, 4, 19, 4),
    "qwen3_moe": (3, 6, 13, 3, 18, 4),
    "deepseek_v2": (3, 6, 13, 5, 27, 4),
    "deepseek_v3": (3, 6, 13, 5, 27, 4),
    "gpt_neox": (2, 4, 0, 0, 9, 0),
    "falcon": (2, 4, 0, 0, 9, 0),
    "falcon_alibi": (2, 0, 0, 0, 9, 0),
    "falcon_grouped": (2, 4, 0, 0, 9, 0),
    "bloom": (2, 0, 0, 0, 9, 0),
    "gpt_oss": (2, 4, 5, 0, 11, 4),
    "bert": (2, 0, 0, 0, 14, 0),
    "t5": (6, 0, 12, 0, 33, 0),
}
"""How many of each of `OPS` a family's program holds once everything is raised.

Families with other norms and activations hold layer_norm and gelu instead, which are ATen ops already. A gated expert of
GPT-OSS clamps its halves, which is no gated_activation.
"""

_CAUSAL = "causal, padding"

ATTENTION: dict[str, tuple[str, ...]] = {
    "llama": (_CAUSAL,) * 2,
    "gpt2": (_CAUSAL,) * 2,
    "opt": (_CAUSAL,) * 2,
    "qwen2": (_CAUSAL,) * 2,
    "qwen3": (_CAUSAL,) * 2,
    "mistral": ("causal, window 5, padding",) * 2,
    "gemma2": ("causal, window 5, softcap 3.0, padding", "causal, softcap 3.0, padding"),
    "gemma3": ("causal, window 5, padding", "causal, window 5, padding", _CAUSAL),
    "phi3": (_CAUSAL,) * 2,
    "mixtral": (_CAUSAL,) * 2,
    "qwen2_moe": (_CAUSAL,) * 2,
    "qwen3_moe": (_CAUSAL,) * 3,
    "deepseek_v2": (_CAUSAL,) * 3,
    "deepseek_v3": (_CAUSAL,) * 3,
    "gpt_neox": (_CAUSAL,) * 2,
    "falcon": (_CAUSAL,) * 2,
    "falcon_alibi": ("causal, padding, alibi",) * 2,
    "falcon_grouped": (_CAUSAL,) * 2,
    "bloom": ("causal, padding, alibi",) * 2,
    "gpt_oss": ("causal, window 5, padding, sinks", "causal, padding, sinks"),
    "bert": ("padding",) * 2,
    "t5": ("padding, bias", "padding, bias", "causal, bias", "padding", "causal, bias", "padding"),
}
"""Each attention of a family, in graph order."""


def attention_text(node: fx.Node) -> str:
    """The attributes of an attention node that are set, in words."""
    words = ["causal"] if argument(node, "causal") else []
    for name in ("window", "chunk", "prefix", "softcap"):
        words += [f"{name} {argument(node, name)}"] if argument(node, name) else []
    for name, word in (("key_positions", "padding"), ("bias", "bias"), ("alibi_slopes", "alibi"), ("sinks", "sinks")):
        words += [word] if argument(node, name) is not None else []
    return ", ".join(words) or "full"
