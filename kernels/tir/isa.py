"""The integer dot product of each instruction set: acc[row] += sum of four unsigned weights times four signed codes.

All of them take a vector of `lanes` int32 sums, 4 * lanes weight bytes and an int32 for each lane that holds four
activation codes, and may only differ in how fast they are. Some can also pick bytes and floats by their places, which
weights that are stored without their zeros need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tvm import tirx

from graphwright.kernels.tir.emit import splat

Dot = Callable[[Any, Any, Any, int], Any]
"""(sums int32xL, weights uint8x4L, four codes as int32xL, L) -> sums int32xL."""

Pick = Callable[[Any, Any], Any]
"""(values, places) -> the values at these places, each run of 16 bytes on its own."""


@dataclass(frozen=True)
class Words:
    """Products of weights below 16 with codes, added up in 16-bit words before they are added to sums.

    No word leaves its range: 2 * `MOST` * 15 * 127 is less than 2^15.

    Attributes:
        multiply: (weights uint8x4L, four codes as int32xL, L) -> products added in pairs, int16x2L.
        add: (sums int32xL, words int16x2L, L) -> sums int32xL.
    """

    multiply: Callable[[Any, Any, int], Any]
    add: Callable[[Any, Any, int], Any]

    MOST: ClassVar[int] = 8
    """How many products may be added to one another."""

    def dot(self, sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
        """A dot product at a time."""
        return self.add(sums, self.multiply(weights, codes, lanes), lanes)


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
        words: what is faster than `dot` for weights below 16, or None.
        pick_bytes: of uint8x4L by uint8x4L below 16, or None where nothing does so at once.
        pick_floats: of float32xL by the lowest two bits of int32xL, or None.
    """

    name: str
    needs: frozenset[str]
    lanes: int
    dot: Dot
    signed: bool = False
    tiles: bool = False
    words: Words | None = None
    pick_bytes: Pick | None = None
    pick_floats: Pick | None = None


def _picking(name: str, dtype: str) -> Pick:
    return lambda values, places: tirx.call_llvm_pure_intrin(dtype, name, values, places)


def _intrinsic(name: str) -> Dot:
    def dot(sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
        spread = tirx.reinterpret(f"int8x{4 * lanes}", codes)
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", name, sums, weights, spread)

    return dot


def _words(multiply_bytes: str, add_pairs: str) -> Words:
    def multiply(weights: Any, codes: Any, lanes: int) -> Any:
        spread = tirx.reinterpret(f"int8x{4 * lanes}", codes)
        return tirx.call_llvm_pure_intrin(f"int16x{2 * lanes}", multiply_bytes, weights, spread)

    def add(sums: Any, words: Any, lanes: int) -> Any:
        ones = splat(tirx.const(1, "int16"), 2 * lanes)
        return sums + tirx.call_llvm_pure_intrin(f"int32x{lanes}", add_pairs, words, ones)

    return Words(multiply, add)


def _by_size(words: Words, with_sign: Callable[[Any, Any, int], Any]) -> Dot:
    """Signed weights: their sizes times codes with their signs. A pair of these fits a word: 2 * 128 * 127 < 2^15."""

    def signed_dot(sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
        signed = tirx.reinterpret(f"int8x{4 * lanes}", weights)
        no_poison = tirx.const(False, "bool")
        size = tirx.call_llvm_pure_intrin(f"int8x{4 * lanes}", f"llvm.abs.v{4 * lanes}i8", signed, no_poison)
        code = with_sign(tirx.reinterpret(f"int8x{4 * lanes}", codes), signed, 4 * lanes)
        return words.dot(sums, tirx.reinterpret(f"uint8x{4 * lanes}", size), code, lanes)

    return signed_dot


def _sign_256(codes: Any, weights: Any, lanes: int) -> Any:
    return tirx.call_llvm_pure_intrin(f"int8x{lanes}", "llvm.x86.avx2.psign.b", codes, weights)


def _sign_512(codes: Any, weights: Any, lanes: int) -> Any:
    none = splat(tirx.const(0, "int8"), lanes)
    return tirx.Select(weights < none, none - codes, codes)


def _generic(sums: Any, weights: Any, codes: Any, lanes: int) -> Any:
    """Four multiplications of 32-bit lanes."""
    quads = tirx.reinterpret(f"int32x{lanes}", weights)

    def constant(value: int) -> Any:
        return splat(tirx.const(value, "int32"), lanes)

    for byte in range(4):
        weight = (quads >> constant(8 * byte)) & constant(255)
        sums = sums + weight * ((codes << constant(24 - 8 * byte)) >> constant(24))
    return sums


_WIDE = {
    "pick_bytes": _picking("llvm.x86.avx512.pshuf.b.512", "uint8x64"),
    "pick_floats": _picking("llvm.x86.avx512.vpermilvar.ps.512", "float32x16"),
}
_HALF = {
    "pick_bytes": _picking("llvm.x86.avx2.pshuf.b", "uint8x32"),
    "pick_floats": _picking("llvm.x86.avx.vpermilvar.ps.256", "float32x8"),
}
_NEON = {"pick_bytes": _picking("llvm.aarch64.neon.tbl1.v16i8", "uint8x16")}

_WORDS_512 = _words("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
_WORDS_256 = _words("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")

VNNI = Isa(
    "avx512_vnni", frozenset({"avx512_vnni", "avx512bw"}), 16, _intrinsic("llvm.x86.avx512.vpdpbusd.512"), **_WIDE
)

ISAS = (
    replace(VNNI, name="amx", needs=VNNI.needs | {"amx_int8", "amx_bf16"}, tiles=True),
    VNNI,
    Isa("avx_vnni", frozenset({"avx_vnni", "avx2"}), 8, _intrinsic("llvm.x86.avx512.vpdpbusd.256"), **_HALF),
    Isa(
        "avx512bw",
        frozenset({"avx512bw"}),
        16,
        _by_size(_WORDS_512, _sign_512),
        signed=True,
        words=_WORDS_512,
        **_WIDE,
    ),
    Isa("avx2", frozenset({"avx2"}), 8, _by_size(_WORDS_256, _sign_256), signed=True, words=_WORDS_256, **_HALF),
    Isa("i8mm", frozenset({"i8mm"}), 4, _intrinsic("llvm.aarch64.neon.usdot.v4i32.v16i8"), **_NEON),
    Isa("asimddp", frozenset({"asimddp"}), 4, _intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8"), signed=True, **_NEON),
    Isa("generic", frozenset(), 4, _generic),
)
"""From the fastest to the one that runs everywhere."""


def choose(features: Sequence[str]) -> Isa:
    """The fastest instruction set among a target's features."""
    return next(isa for isa in ISAS if isa.needs <= set(features))
