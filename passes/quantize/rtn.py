"""Round-to-nearest weight quantization, per output channel or in groups along the input.

    before                       after
    y = linear(x, W, b)          y = quantized_linear(x, codes, scale, zero_point, b)

Symmetric: scale = max|w| / (2^(bits-1) - 1), code = round(w / scale). Asymmetric: scale = (max - min) / (2^bits - 1)
over a range that contains zero, code = round(w / scale) + zero_point, so that zero is exact (Jacob et al. 2018).
Activations stay in floating point. The vocabulary head and the token embedding have their own widths; where they are
one tied matrix and agree, they share the packed one.
"""

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, fx
from torch.nn import functional

from graphwright import packing, structure
from graphwright.contract import DTYPES
from graphwright.errors import PassError
from graphwright.ops import quantized_embedding, quantized_linear
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.program import Program
from graphwright.rewrite import Editor


class Rtn(Pass):
    """Weight-only round-to-nearest."""

    name = "rtn"
    kind = "approximate"
    paper = Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        "Jacob et al.",
        2018,
        "1712.05877",
    )
    requires = ("linear",)
    after = ("merged_linear", "float_dtype")
    provides = ("quantized",)
    conflicts = ("quantized",)

    bits: Literal[4, 8] = Field(4, description="bits per weight")
    group_size: int = Field(64, ge=0, description="weights that share a scale along the input; 0: the whole row")
    symmetric: bool = Field(False, description="no zero points")
    scale_dtype: Literal["float16", "float32"] = Field("float16", description="dtype of the scales")
    head_bits: Literal[0, 4, 8] = Field(8, description="bits of the vocabulary head, per row; 0 keeps it")
    embedding_bits: Literal[0, 8] = Field(8, description="bits of the token embedding, per row; 0 keeps it")

    @field_validator("group_size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("a group size is even, so that two codes share a byte")
        return value

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every linear layer and token embedding whose width is not 0."""
        with Editor(program, self.name, context.fuel) as editor:
            edit = _Quantization(editor, DTYPES[self.scale_dtype])
            head = structure.head(program)
            linears = structure.linears(program)
            for count, (node, weight) in enumerate(linears):
                context.progress(f"{self.name} {weight.target}", count / len(linears))
                if node is head:
                    edit.linear(node, weight, self.head_bits, 0, True)
                else:
                    edit.linear(node, weight, self.bits, self.group_size, self.symmetric)
            for node, table in structure.embeddings(program):
                edit.embedding(node, table, self.embedding_bits)
        return PassResult(program, editor.sites, layer_errors=edit.errors)


class _Quantization:
    """The edit in progress; a weight that several nodes read is quantized once per width."""

    def __init__(self, editor: Editor, scale_dtype: torch.dtype) -> None:
        self.editor = editor
        self.scale_dtype = scale_dtype
        self.errors: dict[str, float] = {}
        self._done: dict[tuple[str, int, int, bool], tuple[str, ...]] = {}

    def linear(self, node: fx.Node, weight: fx.Node, bits: int, group_size: int, symmetric: bool) -> None:
        """Replaces one linear layer, unless its width is 0."""
        if not bits or not self.editor.allow(node):
            return
        width = weight.meta["val"].shape[1]
        group = group_size if group_size and group_size < width else width + width % 2
        packed = self._packed(node, weight, bits, group, symmetric)
        bias = node.args[2] if len(node.args) > 2 else None
        new = self.editor.call(quantized_linear, node.args[0], *packed, bias, f"int{bits}", group, before=node)
        self.editor.replace(node, new, str(weight.target))

    def embedding(self, node: fx.Node, table: fx.Node, bits: int) -> None:
        """Replaces one token embedding, unless its width is 0."""
        if not bits or not self.editor.allow(node):
            return
        value: Tensor = table.meta["val"]
        width = int(value.shape[1])
        group = width + width % 2
        packed = self._packed(node, table, bits, group, True)
        shape = (f"int{bits}", group, width, value.dtype)
        new = self.editor.call(quantized_embedding, node.args[1], *packed, *shape, before=node)
        self.editor.replace(node, new, str(table.target))

    def _packed(
        self, node: fx.Node, weight: fx.Node, bits: int, group: int, symmetric: bool
    ) -> tuple[fx.Node | None, ...]:
        name = str(weight.target)
        key = (name, bits, group, symmetric)
        if key not in self._done:
            tensor = self.editor.program.weight(name)
            format = f"int{bits}"
            packed, scale, zero, self.errors[name] = packed_rows(tensor, format, group, symmetric, self.scale_dtype)
            stored = {f"{name}_{format}": packed, f"{name}_scale": scale, f"{name}_zero_point": zero}
            made = [self.editor.weight(n, t, before=node) for n, t in stored.items() if t is not None]
            self._done[key] = tuple(str(n.target) for n in made)
        nodes: list[fx.Node | None] = [self.editor.read(n, before=node) for n in self._done[key]]
        return (*nodes, None) if symmetric else tuple(nodes)


CHUNK = 1 << 22
"""Weights quantized at a time: the head of a vocabulary is the largest tensor of a small model."""


def packed_rows(
    weight: Tensor, format: str, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Storage, scales, zero points (None if symmetric) and relative error of a weight [N, K], some rows at a time."""
    parts, error, norm = [], 0.0, 0.0
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        codes, scale, zero = quantize(rows, format, group_size, symmetric, scale_dtype)
        packed = packing.pack(codes, format, group_size)
        dense = packing.dequantize(packed, scale, zero, format, group_size)[:, : rows.shape[1]]
        error += float(dense.sub_(rows).square_().sum())
        norm += float(rows.float().square().sum())
        parts.append((packed, scale, zero))
    points = [zero for _, _, zero in parts if zero is not None]
    relative = (error / max(norm, 1e-30)) ** 0.5
    packed, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return packed, scale, torch.cat(points) if points else None, relative


def quantize(
    weight: Tensor, format: str, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K padded], scales [N, G] and zero points [N, G] (None if symmetric) of a weight [N, K].

    Raises:
        PassError: the weight holds NaN or infinity, or a scale overflows `scale_dtype`.
    """
    kind = packing.FORMATS[format]
    wide, missing = weight.float(), -weight.shape[1] % group_size
    wide = (functional.pad(wide, (0, missing)) if missing else wide).unflatten(1, (-1, group_size))
    zero: Tensor | float
    if symmetric:
        scale = _stored(wide.abs().amax(-1) / ((kind.high - kind.low) // 2), scale_dtype)
        zero = float(kind.zero)
    else:
        smallest, largest = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
        scale = _stored((largest - smallest) / (kind.high - kind.low), scale_dtype)
        zero = (kind.low - smallest / scale.float()).round().clamp(kind.low, kind.high).unsqueeze(-1)
    codes = (wide / scale.float().unsqueeze(-1)).add_(zero).round_().clamp_(kind.low, kind.high).flatten(1)
    points = zero.squeeze(-1).to(kind.storage) if isinstance(zero, Tensor) else None
    return codes, scale, points


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored; a group of zeros gets the scale 1, and tiny scales do not vanish."""
    smallest = torch.finfo(dtype).tiny
    stored = torch.where(scale == 0, 1.0, scale.clamp(min=smallest)).to(dtype)
    if not stored.isfinite().all():
        raise PassError("A weight is not finite, or too large for float16 scales", fix="Use scale_dtype: float32")
    return stored
