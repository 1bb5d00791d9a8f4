"""What raising finds in each family: how many of each semantic op, and what its attentions are."""

from torch import fx

from graphwright.match import argument

RAISED: dict[str, dict[str, int]] = {
    "llama": {"attention": 2},
    "gpt2": {"attention": 2},
    "opt": {"attention": 2},
    "qwen2": {"attention": 2},
    "qwen3": {"attention": 2},
    "mistral": {"attention": 2},
    "gemma2": {"attention": 2},
    "gemma3": {"attention": 3},
    "phi3": {"attention": 2},
    "mixtral": {"attention": 2},
    "qwen2_moe": {"attention": 2},
    "qwen3_moe": {"attention": 3},
    "deepseek_v2": {"attention": 3},
    "deepseek_v3": {"attention": 3},
    "gpt_neox": {"attention": 2},
    "falcon": {"attention": 2},
    "falcon_alibi": {"attention": 2},
    "falcon_grouped": {"attention": 2},
    "bloom": {"attention": 2},
    "gpt_oss": {"attention": 2},
    "bert": {"attention": 2},
    "t5": {"attention": 6},
}
"""Number of semantic ops by family and op."""

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
