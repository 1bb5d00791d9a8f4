"""Blocks of activation codes times weight tiles in the tile registers of AMX.

A weight tile as kernels store or unpack it, [K / 4, 16, 4] bytes, is the right operand of the tile product as it lies;
rows of activation codes are the left one. One instruction multiplies 16 rows with 16 outputs over up to 64 codes.

Memory that these instructions read and write looks unused to TVM's StorageRewrite: build kernels without that pass.
Linux grants the registers to a process that asks for them, as `graphwright.target.host` does.
"""

from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import Flat, Index, T, local
from graphwright.kernels.tir.tiles import ROWS

BLOCK = 2
"""Tile rows, of 16 activations each, and weight tiles that one block multiplies: all eight registers."""

TILE = 16
"""Rows of a register, and 32-bit words of one of its rows."""

MOST = 64
"""Codes along K in one register."""

LEAST = 16
"""Fewer codes per product than these are faster in vector registers."""


def depth(span: int) -> int:
    """Codes along K of one product, for sums over `span` codes; 0 where tile registers do not pay."""
    best = max((codes for codes in range(4, MOST + 1, 4) if span % codes == 0), default=0)
    return best if best >= LEAST else 0


def configure(codes: int) -> None:
    """Shapes of the registers for products over `codes` codes: sums, then rows of codes, then weights."""
    shapes = [(ROWS, 4 * ROWS)] * (BLOCK * BLOCK) + [(ROWS, codes)] * BLOCK + [(codes // 4, 4 * ROWS)] * BLOCK
    widths = b"".join(width.to_bytes(2, "little") for _, width in shapes)
    table = bytes([1]) + bytes(15) + widths.ljust(32, b"\0") + bytes(height for height, _ in shapes).ljust(16, b"\0")
    memory = local(16, "int32")
    for word in range(16):
        value = int.from_bytes(table[4 * word : 4 * word + 4], "little", signed=True)
        memory.put(word, tirx.const(value, "int32"), 1)
    _emit("ldtilecfg", tirx.address_of(memory.buffer[0]))


def release() -> None:
    """Empties the registers, so that the kernel need not save them when it switches threads."""
    _emit("tilerelease")


def clear() -> None:
    """Sets all sums to zero."""
    for register in range(BLOCK * BLOCK):
        _emit("tilezero", _register(register))


def load_codes(part: int, codes: Flat, offset: Index, stride: Index) -> None:
    """16 rows of codes that lie `stride` bytes apart."""
    _load(BLOCK * BLOCK + part, codes, offset, stride)


def load_weights(part: int, weights: Flat, offset: Index) -> None:
    """A part of a weight tile."""
    _load(BLOCK * BLOCK + BLOCK + part, weights, offset, 4 * ROWS)


def multiply(*, signed_weights: bool) -> None:
    """Adds all products of the loaded codes and weights to the sums."""
    _multiply("tdpbssd" if signed_weights else "tdpbsud")


def store(row: int, column: int, sums: Flat) -> None:
    """The sums of 16 rows and 16 outputs, as int32 [16, 16]."""
    store_at(row, column, sums, 0, 4 * ROWS)


def store_at(row: int, column: int, target: Flat, offset: Index, stride: int) -> None:
    """Sums into lines of 16 that begin at an element and lie `stride` bytes apart."""
    _emit("tilestored64", _register(row * BLOCK + column), tirx.address_of(target.buffer[offset]), _stride(stride))


def load_left(part: int, words: Flat, offset: Index) -> None:
    """A left operand of bfloat16 pairs, 16 rows of 16 words that lie one after the other."""
    _load(BLOCK * BLOCK + part, words, offset, 4 * TILE)


def load_right(part: int, words: Flat, offset: Index) -> None:
    """A right operand of bfloat16 pairs."""
    _load(BLOCK * BLOCK + BLOCK + part, words, offset, 4 * TILE)


def multiply_halves() -> None:
    """Adds all products of the loaded bfloat16 operands to the sums, which are float32."""
    _multiply("tdpbf16ps")


def _multiply(instruction: str) -> None:
    for row in range(BLOCK):
        for column in range(BLOCK):
            registers = (row * BLOCK + column, BLOCK * BLOCK + row, BLOCK * BLOCK + BLOCK + column)
            _emit(instruction, *map(_register, registers))


def _load(register: int, source: Flat, offset: Index, stride: Index) -> None:
    _emit("tileloadd64", _register(register), tirx.address_of(source.buffer[offset]), _stride(stride))


def _stride(bytes_: Index) -> Any:
    return tirx.const(bytes_, "int64")


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _emit(name: str, *arguments: Any) -> None:
    T.evaluate(tirx.call_llvm_intrin("", f"llvm.x86.{name}", *arguments))
