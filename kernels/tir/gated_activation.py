"""activation(gate) * up where it is not the epilogue of a linear layer (Shazeer 2020, arXiv:2002.05202)."""

from tvm import tirx

from graphwright.kernels.tir.emit import Layout, kernel, let, loop, parallel, widest
from graphwright.kernels.tir.functions import ACTIVATIONS


def gated_activation(activation: str, gate: Layout, up: Layout) -> tirx.PrimFunc:
    """The kernel over rows of two float32 tensors of one shape, whose last dimensions are contiguous."""
    width = gate.shape[-1]
    lanes = widest(width)
    with kernel("gated_activation") as k:
        left, right = k.read("gate", gate.base, "float32"), k.read("up", up.base, "float32")
        out = k.write("out", gate.shape, "float32")
        k.begin()
        with parallel(gate.rows) as row:
            first, second = let(gate.row(row)), let(up.row(row))
            with loop(width // lanes) as i:
                value = let(left.vec(first + i * lanes, lanes))
                product = ACTIVATIONS[activation](value, lanes) * right.vec(second + i * lanes, lanes)
                out.put(row * width + i * lanes, product, lanes)
    return k.function
