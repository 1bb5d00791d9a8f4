"""Operators of ONNX Runtime's own, where they say the same as ours: attention over a cache, rotation, low-bit products.

Grouped-query attention counts slots where ours counts positions: the two agree in causality, because tokens lie in the
order of their positions. What else hides a key (padding, a window, chunks) goes into the operator's bias.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.nn import functional

from graphwright import ops, packing
from graphwright.backends.onnx import semantic
from graphwright.backends.onnx.builder import MICROSOFT
from graphwright.backends.onnx.quantized import quantized_embedding as plain_embedding
from graphwright.backends.onnx.quantized import quantized_linear as plain_linear
from graphwright.backends.onnx.quantized import zeros
from graphwright.backends.onnx.translate import OfNode, Translator
from graphwright.match import argument

aten = torch.ops.aten

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64

SMALLEST_BLOCK = 16


# Attention


def appended(node: fx.Node) -> fx.Node | None:
    """The past tensor, if `node` is past and new entries of a cache one after the other."""
    if node.target is not aten.cat.default or node.args[1:] != (2,):
        return None
    past: fx.Node = node.args[0][0]  # type: ignore[assignment]
    return past if past.op == "placeholder" and str(past.target).startswith("past_") else None


def fits(node: fx.Node) -> bool:
    """Whether grouped-query attention says the same as an attention node."""
    query, key, value = (node.args[i] for i in range(3))
    same_width = key.meta["val"].shape[3] == value.meta["val"].shape[3]
    cached = appended(key) is not None and appended(value) is not None
    return cached and same_width and argument(node, "causal") and not argument(node, "prefix") and query is not key


def attention(t: Translator, node: fx.Node) -> ir.Value:
    """GroupQueryAttention, which also writes the present tensors; else the plain form."""
    key, value = node.args[1], node.args[2]
    if not fits(node):
        return semantic.attention(t, node)
    b = t.builder
    heads, kv_heads = (int(n.meta["val"].shape[1]) for n in (node.args[0], key))
    width = int(node.meta["val"].shape[3])
    new = [node.args[0], *(one.args[0][1] for one in (key, value))]
    rows = [_rows(t, t.value(one), count * width) for one, count in zip(new, (heads, kv_heads, kv_heads), strict=True)]
    past = [t.value(appended(one)) for one in (key, value)]
    sinks, dtype = argument(node, "sinks"), t.value(node.args[0]).dtype
    mask = semantic.mask(t, node)
    if dtype != ir.DataType.FLOAT:
        mask = t.shared_value(("narrow mask", mask, dtype), lambda: semantic.narrow_mask(t, mask, dtype))
    result, *present = b(
        "GroupQueryAttention",
        *rows,
        *past,
        *_lengths(t, node),
        None,
        None,
        None,
        mask,
        t.value(sinks) if sinks is not None else None,
        domain=MICROSOFT,
        outputs=3,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(argument(node, "scale")),
        softcap=float(argument(node, "softcap")) or None,
    )
    batch, _, length, _ = node.meta["val"].shape
    t.shaped(result, dtype, (batch, length, heads * width))
    for one, made in zip((key, value), present, strict=True):
        t.values[one] = t.typed(made, one.meta["val"])
    per_head = b("Reshape", result, b.ints([0, 0, heads, width]))
    return b("Transpose", per_head, perm=[0, 2, 1, 3])


def _rows(t: Translator, x: ir.Value, features: int) -> ir.Value:
    """[B, H, S, D] → [B, S, H * D]."""
    b = t.builder
    return b("Reshape", b("Transpose", x, perm=[0, 2, 1, 3]), b.ints([0, 0, features]))


def _lengths(t: Translator, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Slots in use but one, per sequence, and the number of slots: all sequences use as many, padding included."""
    b, positions = t.builder, t.value(argument(node, "key_positions"))

    def make() -> tuple[ir.Value, ir.Value]:
        total = b("Cast", b("Shape", positions, start=1, end=2), to=INT32)
        batch = b("Shape", positions, start=0, end=1)
        last = b("Expand", b("Sub", total, b.constant([1], INT32)), batch)
        return last, b("Squeeze", total, b.ints([0]))

    made: tuple[ir.Value, ir.Value] = t.shared_value(("lengths", positions), make)
    return made


def rope(t: Translator, node: fx.Node) -> ir.Value:
    """RotaryEmbedding over a table of the positions at hand, so that no length is built in."""
    b, x = t.builder, t.value(node.args[0])
    positions = argument(node, "positions")
    batch, rows = (n.meta["val"].shape[0] for n in (node.args[0], positions))
    rotary = 2 * int(argument(node, "inv_freq").meta["val"].shape[0])
    if str(batch) != str(rows) or rotary != node.meta["val"].shape[-1]:
        return semantic.rope(t, node)
    tables = semantic.rotary_table(t, node, x.dtype)

    def make() -> tuple[ir.Value, ir.Value, ir.Value]:
        shape = b("Shape", t.value(positions))
        count = b("ReduceProd", shape, keepdims=0)
        steps = b("Range", b.scalar(0, INT64), count, b.scalar(1, INT64))
        cos, sin = (b("Reshape", table, b.ints([-1, rotary // 2])) for table in tables)
        return b("Reshape", steps, shape), cos, sin

    places = t.shared_value(("rotation", tables[0]), make)
    return b("RotaryEmbedding", x, *places, domain=MICROSOFT, interleaved=int(argument(node, "interleaved")))


# Low-bit weights


def block_size(groups: int, group_size: int) -> int:
    """The largest power of two, 16 at least, that cuts groups into whole blocks; 0 if there is none.

    A scale per row fits any block.
    """
    if groups == 1:
        return 32
    block = group_size & -group_size
    return block if block >= SMALLEST_BLOCK else 0


def blocked(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, group_size: int, features: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Unsigned codes [N, blocks, block], scales and zero points [N, blocks], and the block, of a packed weight."""
    groups = scale.shape[1]
    block = block_size(groups, group_size)
    blocks = -(-features // block)
    points = zeros(zero_point, scale, format)
    codes = packing.unpack(weight, format, group_size)
    if packing.FORMATS[format].low < 0:
        codes = (codes.to(torch.int16) - packing.FORMATS[format].low).to(torch.uint8)
        points = points.float() - packing.FORMATS[format].low
    missing = blocks * block - codes.shape[1]
    # Padding multiplies what is not there, so its code does not matter.
    codes = functional.pad(codes, (0, missing)) if missing > 0 else codes[:, : blocks * block]
    scales, points = (_per_block(one, group_size // block, blocks) for one in (scale, points))
    return codes.unflatten(1, (blocks, block)), scales, points, block


def _per_block(values: Tensor, repeats: int, blocks: int) -> Tensor:
    """[N, G] → [N, blocks]."""
    if values.shape[1] == 1:
        return values.expand(-1, blocks)
    return values.repeat_interleave(repeats, 1)[:, :blocks]


def quantized_linear(t: Translator, node: fx.Node) -> ir.Value:
    """MatMulNBits; for 8-bit codes only where activations may be rounded, as it is a hundred times slower otherwise."""
    x, bias = t.value(node.args[0]), argument(node, "bias")
    weight, scale, zero_point = (t.tensor(argument(node, name)) for name in ("weight", "scale", "zero_point"))
    format, group_size = argument(node, "format"), argument(node, "group_size")
    name = str(argument(node, "weight").target)
    assert weight is not None and scale is not None  # noqa: S101, PT018
    bits = packing.FORMATS[format].bits
    if (
        format not in ("int4", "int8")
        or not block_size(scale.shape[1], group_size)
        or (bits == 8 and not t.options.integer_products)
    ):
        return plain_linear(t, node)
    features, outputs = int(node.args[0].meta["val"].shape[-1]), int(weight.shape[0])
    b = t.builder
    codes, scales, points, block = blocked(weight, scale, zero_point, format, group_size, features)
    whole = torch.equal(points, points.round())
    middle = bool((points == 1 << (bits - 1)).all())
    zero = None
    if not middle:
        stored = nibbles(points.to(torch.uint8), bits) if whole else points.to(node.meta["val"].dtype)
        zero = b.weight(f"{name}_blocks_zero", stored)
    return b(
        "MatMulNBits",
        x,
        b.weight(f"{name}_blocks", nibbles(codes, bits)),
        b.weight(f"{name}_blocks_scale", scales.to(node.meta["val"].dtype)),
        zero,
        None,
        t.value(bias) if bias is not None else None,
        domain=MICROSOFT,
        K=features,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=4 if t.options.integer_products else None,
    )


def nibbles(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes: 4-bit ones two to a byte along the last dimension, the first in the low half."""
    if bits == 8:
        return codes.to(torch.uint8)
    even = functional.pad(codes, (0, codes.shape[-1] % 2)).to(torch.uint8).unflatten(-1, (-1, 2))
    packed: Tensor = even[..., 0] | (even[..., 1] << 4)
    return packed


def quantized_embedding(t: Translator, node: fx.Node) -> ir.Value:
    """GatherBlockQuantized over 8-bit rows of whole blocks; else the plain form."""
    weight, scale, zero_point = (t.tensor(argument(node, name)) for name in ("weight", "scale", "zero_point"))
    format, group_size, width = (argument(node, name) for name in ("format", "group_size", "embedding_dim"))
    assert weight is not None and scale is not None  # noqa: S101, PT018
    block = block_size(scale.shape[1], group_size)
    if packing.FORMATS[format].bits != 8 or zero_point is not None or not block or width % block:
        return plain_embedding(t, node)
    name, b = str(argument(node, "weight").target), t.builder
    codes, scales, points, block = blocked(weight, scale, None, format, group_size, width)
    del points  # 128, which is what the operator takes for granted
    dtype = argument(node, "dtype")
    return b(
        "GatherBlockQuantized",
        b.weight(f"{name}_table", codes.flatten(1)),
        t.value(node.args[0]),
        b.weight(f"{name}_table_scale", scales.to(dtype)),
        domain=MICROSOFT,
        bits=8,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )


def cached_cat(t: Translator, node: fx.Node) -> Any:
    """Left to the attention that reads it, if that appends to the cache itself."""
    readers = [user for user in node.users if user.target is ops.attention.target]
    if appended(node) is not None and len(readers) == 1 and fits(readers[0]):
        return None
    return t.builder("Concat", *t.value(node.args[0]), axis=node.args[1] if len(node.args) > 1 else 0)


ORT: dict[Any, OfNode] = {
    ops.attention.target: OfNode(attention),
    ops.rope.target: OfNode(rope),
    ops.quantized_linear.target: OfNode(quantized_linear),
    ops.quantized_embedding.target: OfNode(quantized_embedding),
    aten.cat.default: OfNode(cached_cat),
}
"""Translations that use ONNX Runtime's own operators."""
