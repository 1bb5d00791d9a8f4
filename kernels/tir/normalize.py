"""Normalisation of rows, alone or with quantization of what comes out.

`rms`: x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467), with 1 + weight for Gemma.
`layer`: (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).
"""

from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx

from graphwright.kernels.tir.emit import (
    Flat,
    Layout,
    kernel,
    let,
    local,
    loop,
    parallel,
    reduce_add,
    spread,
    widest,
)  # fmt: skip
from graphwright.kernels.tir.functions import constant
from graphwright.kernels.tir.quantize import CodeBuffers, CodeRow, quantize_row


@dataclass(frozen=True)
class Norm:
    """A normalisation to make a kernel for."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    unit_offset: bool = False


def normalize(norm: Norm, layout: Layout, described: CodeRow | None = None) -> tirx.PrimFunc:
    """The kernel over rows of `layout`; puts out rows of codes, where they are described, instead of floats."""
    width = layout.shape[-1]
    with kernel(f"{norm.kind}_norm") as k:
        x = k.read("x", layout.base, "float32")
        weight = k.read("weight", (width,), "float32") if norm.weight else None
        bias = k.read("bias", (width,), "float32") if norm.bias else None
        codes = CodeBuffers(k, layout.shape[:-1], described) if described else None
        out = None if codes else k.write("out", layout.shape, "float32")
        k.begin()
        if codes:
            codes.begin()
        with parallel(layout.rows) as row:
            start = let(layout.row(row))
            mean = _mean(x, start, width) if norm.kind == "layer" else None
            factor = _factor(x, start, width, mean, norm.eps)

            def value(at: Any, lanes: int) -> Any:
                centred = x.vec(start + at, lanes)
                if mean is not None:
                    centred = centred - spread(mean, lanes)
                result = centred * spread(factor, lanes)
                if weight is not None:
                    gain = weight.vec(at, lanes)
                    result = result * (gain + constant(1.0, lanes) if norm.unit_offset else gain)
                return result + bias.vec(at, lanes) if bias is not None else result

            if codes:
                quantize_row(value, codes, row)
            else:
                lanes = widest(width)
                with loop(width // lanes) as i:
                    out.put(row * width + i * lanes, value(i * lanes, lanes), lanes)
    return k.function


def _mean(x: Flat, start: Any, width: int) -> Any:
    return let(_sum(width, lambda at, lanes: x.vec(start + at, lanes)) * tirx.const(1.0 / width, "float32"))


def _factor(x: Flat, start: Any, width: int, mean: Any, eps: float) -> Any:
    def square(at: Any, lanes: int) -> Any:
        value = x.vec(start + at, lanes)
        if mean is not None:
            value = value - spread(mean, lanes)
        value = let(value)
        return value * value

    average = _sum(width, square) * tirx.const(1.0 / width, "float32")
    return let(tirx.const(1.0, "float32") / tirx.sqrt(average + tirx.const(eps, "float32")))


def _sum(width: int, term: Any) -> Any:
    lanes = widest(width)
    total = local(lanes, "float32")
    total.put(0, constant(0.0, lanes), lanes)
    with loop(width // lanes) as i:
        total.put(0, total.vec(0, lanes) + term(i * lanes, lanes), lanes)
    return let(reduce_add(total.vec(0, lanes), lanes))
