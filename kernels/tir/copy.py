"""A strided tensor as a contiguous one."""

from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import Layout, kernel, let, loop, parallel, widest


def copy(layout: Layout, dtype: str) -> tirx.PrimFunc:
    """The kernel that writes the elements of `layout` one after the other."""
    with kernel("copy") as k:
        x = k.read("x", layout.base, dtype)
        out = k.write("out", layout.shape, dtype)
        k.begin()
        width: Any = layout.shape[-1] if layout.shape else 1
        step = layout.strides[-1] if layout.shape else 0
        with parallel(layout.rows) as row:
            start, target = let(layout.row(row)), let(row * width)
            if isinstance(width, int) and step == 1:
                lanes = widest(width)
                with loop(width // lanes) as i:
                    out.put(target + i * lanes, x.vec(start + i * lanes, lanes), lanes)
            else:
                with loop(width) as i:
                    out.put(target + i, x[start + i * step], 1)
    return k.function
