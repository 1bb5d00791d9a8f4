"""The semantic ops of Graphwright, one a file. Importing this package registers them all.

Letters in shapes: B batch, S query length, T key length, H heads, Hkv key-value heads, D head_dim, Dv head_dim of
the values, N output features, K input features, G groups along K.
"""

from graphwright.ops.attention import attention
from graphwright.ops.attention_with_mass import attention_with_mass
from graphwright.ops.evicting_cache import evicting_update
from graphwright.ops.expert_capacity import expert_capacity
from graphwright.ops.expert_choice import expert_choice
from graphwright.ops.experts import experts
from graphwright.ops.fetch_experts import fetch_experts
from graphwright.ops.gated_activation import gated_activation
from graphwright.ops.grouped_linear import grouped_linear
from graphwright.ops.hadamard_transform import hadamard_transform
from graphwright.ops.kivi_cache import kivi_read, kivi_update
from graphwright.ops.kv_cache_update import kv_cache_update
from graphwright.ops.kvquant_cache import kvquant_decode, kvquant_encode
from graphwright.ops.moe_routing import moe_routing
from graphwright.ops.paged_cache import paged_read, paged_update
from graphwright.ops.quantize_dequantize import quantize_dequantize
from graphwright.ops.quantize_tokens import dequantize_tokens, quantize_tokens
from graphwright.ops.quantized_embedding import quantized_embedding
from graphwright.ops.quantized_experts import quantized_experts
from graphwright.ops.quantized_linear import quantized_linear
from graphwright.ops.rms_norm import rms_norm
from graphwright.ops.rope import rope
from graphwright.ops.sample_tokens import sample_tokens
from graphwright.ops.sparse_linear import sparse_linear
from graphwright.ops.spqr_linear import spqr_linear
from graphwright.ops.streaming_cache import streaming_attention, streaming_slots

__all__ = [
    "attention",
    "attention_with_mass",
    "dequantize_tokens",
    "evicting_update",
    "expert_capacity",
    "expert_choice",
    "experts",
    "fetch_experts",
    "gated_activation",
    "grouped_linear",
    "hadamard_transform",
    "kivi_read",
    "kivi_update",
    "kv_cache_update",
    "kvquant_decode",
    "kvquant_encode",
    "moe_routing",
    "paged_read",
    "paged_update",
    "quantize_dequantize",
    "quantize_tokens",
    "quantized_embedding",
    "quantized_experts",
    "quantized_linear",
    "rms_norm",
    "rope",
    "sample_tokens",
    "sparse_linear",
    "spqr_linear",
    "streaming_attention",
    "streaming_slots",
]
