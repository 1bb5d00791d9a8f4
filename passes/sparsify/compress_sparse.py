"""Stores pruned weights without their zeros: 2:4 as halves and places, other patterns as non-zeros and a bitmask.

    before                            after
    linear(x, W, b)                   sparse_linear(x, values, places, b)
    quantized_linear(x, Q, s, b)      sparse_linear(x, codes, places, s, b)        2:4 only

Mishra et al. 2021, arXiv:2104.08378, for 2:4. This saves bytes. Processors have no fast kernel for either layout: there
the weight is filled up with zeros before each product, which costs time, and the report says so.
"""

import torch
from torch import Tensor, fx

from graphwright import packing, structure
from graphwright.ops import quantized_linear, sparse_linear
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.sparsity import compress, to_bitmask

aten = torch.ops.aten


class CompressSparse(Pass):
    """Packs weights with zeros where that takes fewer bytes."""

    name = "compress_sparse"
    kind = "exact"
    paper = Paper("Accelerating Sparse Deep Neural Networks", "Mishra et al.", 2021, "2104.08378")
    requires = ("linear",)
    after = ("sparse", "quantized", "quantized_activations", "kv_cache", "explicit_kv_cache")
    provides = ("compressed_sparse",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every linear layer whose weight gets smaller; others stay."""
        saved = 0
        with Editor(program, self.name, context.fuel) as editor:
            sites = [(node, _float_parts(program, node, weight)) for node, weight in structure.linears(program)]
            sites += [(node, _quantized_parts(program, node)) for node in program.calls(quantized_linear.target)]
            for node, parts in sites:
                if parts is None or not editor.allow(node):
                    continue
                tensors, rest, fewer = parts
                name = str(node.args[1].target)
                stored = [None if t is None else editor.weight(f"{name}_{key}", t, node) for key, t in tensors.items()]
                new = editor.call(sparse_linear, node.args[0], *stored, *rest, before=node)
                editor.replace(node, new, name)
                saved += fewer
        notes: dict[str, object] = {"bytes_saved": saved}
        if context.target.kind == "cpu" and editor.sites:
            notes["kernel"] = "none on this target: weights are filled up with zeros before each product"
        return PassResult(program, editor.sites, notes=notes)


Parts = tuple[dict[str, Tensor | None], tuple[object, ...], int]
"""Tensors to store, the other arguments of the op, and the bytes that are saved."""


def _float_parts(program: Program, node: fx.Node, weight: fx.Node) -> Parts | None:
    dense, bias = program.weight(weight), node.args[2] if len(node.args) > 2 else None
    halved = _is_halved(dense)
    values, places = compress(dense) if halved else to_bitmask(dense)
    saved = dense.nbytes - values.nbytes - places.nbytes
    if saved <= 0:
        return None
    layout = "2:4" if halved else "bitmask"
    tensors = {"values": values, "places": places, "scale": None, "zero_point": None}
    return tensors, (bias, layout, "", 0, int(dense.shape[0])), saved


def _quantized_parts(program: Program, node: fx.Node) -> Parts | None:
    packed, scale, zero = (program.weight(a) if isinstance(a, fx.Node) else None for a in node.args[1:4])
    bias, format, group_size = node.args[4], str(node.args[5]), int(node.args[6])
    width = int(node.args[0].meta["val"].shape[-1])
    unit = packing.FORMATS[format].unit
    if group_size % (4 * unit) or width % group_size or (zero is not None and zero.is_floating_point()):
        return None
    dense = packing.dequantize(packed, scale, zero, format, group_size)
    if not _is_halved(dense):
        return None
    values, places = compress(dense)
    twice = [None if t is None else t.float().repeat_interleave(2, 0).unsqueeze(-1) for t in (scale, zero)]
    grouped = values.flatten(0, 1).unflatten(1, (-1, group_size // 4))
    codes = packing.encode(grouped / twice[0], format, twice[1])
    small = packing.pack(codes.flatten(1), format, group_size // 4)
    saved = packed.nbytes - small.nbytes - places.nbytes
    if saved <= 0:
        return None
    tensors = {"values": small, "places": places, "scale": scale, "zero_point": zero}
    return tensors, (bias, "2:4", format, group_size, int(dense.shape[0])), saved


def _is_halved(dense: Tensor) -> bool:
    return dense.shape[1] % 4 == 0 and bool(((dense.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all())
