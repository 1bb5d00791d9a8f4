"""The integer dot product of each instruction set: acc[row] += sum of four unsigned weights times four signed codes.

All of them take a vector of `lanes` int32 sums, 4 * lanes weight bytes and one int32 that holds four activation codes,
and may only differ in how fast they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import splat

Dot = Callable[[Any, Any, Any, int], Any]
"""(sums int32xL, weights uint8x4L, four codes as int32, L) -> sums int32xL."""


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        name: of the extension that the dot product comes from.
        needs: features of a target that it asks for.
        lanes: int32 lanes of one instruction.
        dot: the instruction.
        signed: it takes both operands signed, so unsigned weights of 8 bits are read minus 128.
        tiles: there are tile registers besides, for products of many rows.
    """

    name: str
    needs: frozenset[str]
    lanes: int
    dot: Dot
    signed: bool = False
    tiles: bool = False


def _intrinsic(name: str) -> Dot:
    def dot(sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
        spread = tirx.reinterpret(f"int8x{4 * lanes}", splat(codes, lanes))
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", name, sums, weights, spread)

    return dot


def _by_words(multiply_add: str) -> Dot:
    """Even and odd bytes as 16-bit words, whose products are added in pairs: exact, unlike the byte instruction."""

    def dot(sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
        words = f"int16x{2 * lanes}"

        def constant(value: int) -> Any:
            return splat(tirx.const(value, "int16"), 2 * lanes)

        weight = tirx.reinterpret(words, weights)
        code = tirx.reinterpret(words, splat(codes, lanes))
        even, odd = (code << constant(8)) >> constant(8), code >> constant(8)
        low = weight & constant(255)
        high = (weight >> constant(8)) & constant(255)
        for left, right in ((low, even), (high, odd)):
            sums = sums + tirx.call_llvm_pure_intrin(f"int32x{lanes}", multiply_add, left, right)
        return sums

    return dot


def _generic(sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
    """Four multiplications of 32-bit lanes."""
    quads = tirx.reinterpret(f"int32x{lanes}", weights)
    for byte in range(4):
        shift = splat(tirx.const(8 * byte, "int32"), lanes)
        weight = (quads >> shift) & splat(tirx.const(255, "int32"), lanes)
        code = (codes << tirx.const(24 - 8 * byte, "int32")) >> tirx.const(24, "int32")
        sums = sums + weight * splat(code, lanes)
    return sums


VNNI = Isa("avx512_vnni", frozenset({"avx512_vnni", "avx512bw"}), 16, _intrinsic("llvm.x86.avx512.vpdpbusd.512"))

ISAS = (
    replace(VNNI, name="amx_int8", needs=VNNI.needs | {"amx_int8"}, tiles=True),
    VNNI,
    Isa("avx_vnni", frozenset({"avx_vnni", "avx2"}), 8, _intrinsic("llvm.x86.avx512.vpdpbusd.256")),
    Isa("avx512bw", frozenset({"avx512bw"}), 16, _by_words("llvm.x86.avx512.pmaddw.d.512")),
    Isa("avx2", frozenset({"avx2"}), 8, _by_words("llvm.x86.avx2.pmadd.wd")),
    Isa("i8mm", frozenset({"i8mm"}), 4, _intrinsic("llvm.aarch64.neon.usdot.v4i32.v16i8")),
    Isa("asimddp", frozenset({"asimddp"}), 4, _intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8"), signed=True),
    Isa("generic", frozenset(), 4, _generic),
)
"""From the fastest to the one that runs everywhere."""


def choose(features: Sequence[str]) -> Isa:
    """The fastest instruction set among a target's features."""
    return next(isa for isa in ISAS if isa.needs <= set(features))
