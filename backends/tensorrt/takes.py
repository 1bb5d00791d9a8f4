"""What TensorRT has forms for, by whichever way a program reaches it: the ONNX parser or torch_tensorrt's converters.

TensorRT multiplies codes of rows in int8 and FP8 and of blocks in int4; its weights have no zero points. Its attention
kernels are for half precision, and its products over codes of activations for one scale per tensor, or per token where
the step is multiplied back after the product.
"""

from typing import Any

import torch
from torch import fx

from graphwright import ops
from graphwright.match import argument

FORMATS = ("int8", "int4", "fp8_e4m3")
"""Formats of `graphwright.packing` that weights may have."""

ROUNDED = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
"""Formats of activations that products run on."""

HEAD_DIMS = range(16, 257, 8)
"""Head sizes that TensorRT has attention kernels for."""


def per_token(node: Any) -> bool:
    """Whether the activations are rounded with one scale per token, which a product can give back afterwards."""
    if node.target is not ops.quantize_dequantize.target or argument(node, "scale") is not None:
        return False
    return argument(node, "format") in ROUNDED and not argument(node, "group_size")


def on_codes(node: fx.Node) -> bool:
    """Whether a product runs over codes of activations: TensorRT multiplies codes of one format only."""
    if node.target is not ops.quantized_linear.target:
        return False
    given: Any = node.args[0]
    return per_token(given) and argument(given, "format") == argument(node, "format")


def has_kernel(node: fx.Node) -> bool:
    """Whether TensorRT has a kernel for an attention: half precision, one head size, no soft cap, no sinks."""
    query, key, value = (node.args[i].meta["val"] for i in range(3))
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = argument(node, "sinks") is None and not argument(node, "softcap")
    return half and plain and int(key.shape[3]) == int(value.shape[3]) and int(key.shape[3]) in HEAD_DIMS
