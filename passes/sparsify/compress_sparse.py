"""Stores pruned weights without their zeros, in the layout that takes the fewest bytes.

    before                            after
    linear(x, W, b)                   sparse_linear(x, values, places, b)
    quantized_linear(x, Q, s, b)      sparse_linear(x, codes, places, s, b)

2:4 (Mishra et al. 2021, arXiv:2104.08378): half the values and a bit per weight, so 3 bits per weight in int4. Blocks
whose weights are all zero: the other blocks, and a bit per block. Else a bitmask: the other values, and a bit per
weight. Only 2:4 has kernels, and for a GPU nothing else is compressed, nor is what its integer tensor cores multiply,
which is faster than half the bytes; other layouts save bytes and cost time, because weights are filled up with zeros
before each product, and the report says so.

With `tensor_cores`, floating-point 2:4 weights get the layout that sparse tensor cores of NVIDIA's GPUs read (compute
capability 8.0 and above), which halves the arithmetic of long prompts too; torch's CUTLASS kernel multiplies them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional

from graphwright import packing, structure
from graphwright.errors import PassError
from graphwright.ops import quantize_dequantize, quantized_linear, sparse_linear
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor
from graphwright.sparsity import TENSOR_CORES, compress, compress_for_tensor_cores, tensor_core_obstacle, to_blocks

aten = torch.ops.aten

GPU_FORMATS = ("", "int8", "int4")
"""Values that the kernels of GPUs take in layout 2:4."""

SIDES = (4, 8, 16, 32, 64)
"""Rows and columns of the blocks that are tried."""


@dataclass(frozen=True)
class Dense:
    """A weight as it is stored now.

    Attributes:
        values: floating-point [N, K], or codes [N, K] without padding.
        kept: bool [N, K], what is not zero.
        bytes: size of the stored values.
        scale: [N, G] or None.
        zero_point: [N, G] or None.
        bias: the node of the bias or None.
        format: of the codes, or empty.
        group_size: of the codes.
    """

    values: Tensor
    kept: Tensor
    bytes: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    bias: fx.Node | None = None
    format: str = ""
    group_size: int = 0

    @property
    def bits(self) -> int:
        """Of one value."""
        return packing.FORMATS[self.format].bits if self.format else 8 * self.values.itemsize


@dataclass(frozen=True)
class Stored:
    """A weight without zeros: values and places as `sparse_linear` takes them."""

    layout: str
    values: Tensor
    places: Tensor

    @property
    def bytes(self) -> int:
        """Size."""
        return self.values.nbytes + self.places.nbytes


class CompressSparse(Pass):
    """Packs weights with zeros where that takes fewer bytes."""

    name = "compress_sparse"
    kind = "exact"
    paper = Paper("Accelerating Sparse Deep Neural Networks", "Mishra et al.", 2021, "2104.08378")
    requires = ("linear",)
    after = ("sparse", "quantized", "quantized_activations", "kv_cache", "explicit_kv_cache")
    provides = ("compressed_sparse",)

    tensor_cores: bool = Field(False, description="store 2:4 weights as sparse tensor cores of NVIDIA's GPUs read them")

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every linear layer whose weight gets smaller; others stay.

        Raises:
            PassError: sparse tensor cores are asked for, and the target has none.
        """
        if self.tensor_cores and context.target.kind != "cuda":
            raise PassError(
                f"The layout of sparse tensor cores is for CUDA targets, and this one is {context.target.name}",
                where=self.name,
                fix="Leave out tensor_cores, or compile for a target such as cuda:sm_80",
            )
        on_gpu = context.target.kind != "cpu"
        layouts: dict[str, list[int]] = {}
        obstacles: set[str] = set()
        with Editor(program, self.name, context.fuel) as editor:
            for node, dense in _weights(program):
                stored = None if on_gpu and not _has_gpu_kernel(node, dense) else _smallest(dense, halves_only=on_gpu)
                if self.tensor_cores and stored is not None:
                    obstacle = tensor_core_obstacle(dense.values)
                    obstacles |= {obstacle} - {""}
                    stored = stored if obstacle else Stored(TENSOR_CORES, *compress_for_tensor_cores(dense.values))
                if stored is None or not editor.allow(node):
                    continue
                name = str(node.args[1].target)
                parts: dict[str, Tensor | None] = {"values": stored.values, "places": stored.places}
                parts |= {"scale": dense.scale, "zero_point": dense.zero_point}
                made = [None if t is None else editor.weight(f"{name}_{key}", t, node) for key, t in parts.items()]
                rest = (dense.bias, stored.layout, dense.format, dense.group_size, len(dense.values))
                new = editor.call(sparse_linear, node.args[0], *made, *rest, before=node)
                editor.replace(node, new, f"{name}: {stored.layout}")
                count = layouts.setdefault(stored.layout, [0, 0])
                count[0] += 1
                count[1] += dense.bytes - stored.bytes
        return PassResult(program, editor.sites, notes=_notes(layouts, obstacles))


def _notes(layouts: dict[str, list[int]], obstacles: set[str]) -> dict[str, object]:
    notes: dict[str, object] = {
        "layouts": {layout: count for layout, (count, _) in layouts.items()},
        "bytes_saved": sum(saved for _, saved in layouts.values()),
    }
    slow = [layout for layout in layouts if layout not in ("2:4", TENSOR_CORES)]
    if slow:
        notes["kernel"] = f"none for {', '.join(slow)}: weights are filled up with zeros before each product"
    if obstacles:
        notes["tensor_cores"] = [f"a weight stays 2:4 because {obstacle}" for obstacle in sorted(obstacles)]
    return notes


def _weights(program: Program) -> Iterator[tuple[fx.Node, Dense]]:
    """Every linear layer but the head with a stored weight, and the weight."""
    head = structure.head(program)
    for node, weight in structure.linears(program):
        if node is not head:
            values = program.weight(weight)
            bias = node.args[2] if len(node.args) > 2 else None
            yield node, Dense(values, values != 0, values.nbytes, bias=bias)
    for node in program.calls(quantized_linear.target):
        if node is not head:
            yield node, _quantized(program, node)


def _quantized(program: Program, node: fx.Node) -> Dense:
    packed, scale, zero = (program.weight(a) if isinstance(a, fx.Node) else None for a in node.args[1:4])
    bias, format, group_size = node.args[4], str(node.args[5]), int(node.args[6])
    width = int(node.args[0].meta["val"].shape[-1])
    kept = packing.dequantize(packed, scale, zero, format, group_size)[:, :width] != 0
    codes = packing.unpack(packed, format, group_size)[:, :width]
    return Dense(codes, kept, packed.nbytes, scale, zero, bias, format, group_size)


def _has_gpu_kernel(node: fx.Node, dense: Dense) -> bool:
    """Whether a 2:4 form of the weight is multiplied faster than its dense form."""
    return dense.format in GPU_FORMATS and node.args[0].target is not quantize_dequantize.target


def _smallest(dense: Dense, *, halves_only: bool) -> Stored | None:
    """The smallest layout, or None where none is smaller than the weight."""
    found = _halves(dense)
    if found is None and not halves_only:
        found = _blocks(dense)
    return found if found is not None and found.bytes < dense.bytes else None


def _halves(dense: Dense) -> Stored | None:
    """As 2:4, where the weight is and its groups of a scale can be halved."""
    kept, group = dense.kept, dense.group_size
    if kept.shape[1] % 4 or (kept.unflatten(1, (-1, 4)).sum(-1) > 2).any():
        return None
    if not dense.format:
        return Stored("2:4", *compress(dense.values))
    fractional = dense.zero_point is not None and dense.zero_point.is_floating_point()
    if fractional or group % (4 * packing.FORMATS[dense.format].unit) or kept.shape[1] % group:
        return None
    # Codes are moved by what they stand for: zero stands for zero, whatever its code.
    values, places = compress(torch.where(kept, dense.values.float() + SHIFT, 0.0))
    codes = torch.where(values == 0, _zeros(dense)[:, None].repeat_interleave(group // 4, 2), values - SHIFT)
    return Stored("2:4", packing.pack(codes.flatten(0, 1), dense.format, group // 4), places)


SHIFT = 256.0
"""Makes codes positive and larger than zero, so that only what is not kept is zero."""


def _zeros(dense: Dense) -> Tensor:
    """The code of zero of every group, float32 [N, G]."""
    if dense.zero_point is not None:
        return dense.zero_point.float()
    return torch.full(dense.scale.shape, float(packing.FORMATS[dense.format].zero))


def _blocks(dense: Dense) -> Stored | None:
    """As the blocks, or single weights, that take the fewest bytes."""
    rows, width = dense.kept.shape
    sizes = {}
    for r in (1, *SIDES):
        for c in (1, *SIDES):
            if (r == 1) == (c == 1) and rows % r == 0 and width % c == 0:
                count = int(dense.kept.unflatten(1, (-1, c)).unflatten(0, (-1, r)).any(3).any(1).sum())
                sizes[r, c] = count * r * c * dense.bits + rows * width // (r * c)
    r, c = min(sizes, key=sizes.__getitem__)
    if sizes[r, c] >= dense.bits * rows * width:
        return None
    values, places = to_blocks(dense.values, dense.kept, r, c)
    if dense.format:
        unit = packing.FORMATS[dense.format].unit
        flat = functional.pad(values.flatten(), (0, -values.numel() % unit))
        values = packing.pack(flat[None], dense.format, unit)[0]
    return Stored(f"{r}x{c}", values, places)
