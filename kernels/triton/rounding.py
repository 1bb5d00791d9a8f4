"""Device functions that several kernels share: rounding to the nearest even integer, and elementary functions."""

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """The nearest integer of float32 `x`, ties to even, for |x| < 2**22, as `torch.round` gives it."""
    # Adding 1.5 * 2**23 leaves no fraction bits; the hardware rounds ties to even.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_rows(x, LARGEST: tl.constexpr):
    """Codes (as float32) and scale of every row of float32 `x` [R, K]: max|x| / LARGEST per row."""
    largest = tl.max(tl.abs(x), axis=1)
    # A row of zeros has no scale of its own; any will do, and this is the reference's.
    scale = tl.maximum(tl.math.div_rn(largest, LARGEST * 1.0), 1.1754943508222875e-38)
    codes = round_half_even(tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    return tl.minimum(tl.maximum(codes, -LARGEST * 1.0), LARGEST * 1.0), scale


@triton.jit
def tanh(x):
    """Hyperbolic tangent from the logistic function, which saturates instead of overflowing."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def sine_and_cosine(x):
    """Sine and cosine of float32 `x`, |x| < 2**17, to about one unit in the last place.

    The library's functions reserve stack memory in every thread for the reduction of huge arguments. Here the
    argument is reduced by multiples of pi / 2 in parts of seven bits (Cody and Waite 1980), whose products are exact,
    and the remainder goes through the polynomials of Cephes (Moshier 1989).
    """
    quarter = round_half_even(x * 0.6366197723675814)
    y = x - quarter * 1.5625
    y = y - quarter * 0.0081787109375
    y = y - quarter * 0.00011730194091796875
    y = y - quarter * 3.129243850708008e-07
    y = y - quarter * 9.92093629470503e-10
    square = y * y
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * y + y
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine = cosine - 0.5 * square + 1.0
    turn = quarter.to(tl.int32) & 3
    swapped = (turn & 1) == 1
    first = tl.where(swapped, cosine, sine)
    second = tl.where(swapped, sine, cosine)
    first = tl.where(turn >= 2, -first, first)
    second = tl.where((turn == 1) | (turn == 2), -second, second)
    return first, second


@triton.jit
def encode_e4m3(x):
    """The bits of the nearest e4m3 number, as int32, of float32 `x` within [-448, 448]; -0 where it was.

    In whole numbers, because not every GPU, nor the interpreter, converts this type. Ties go to even: halfway between
    two numbers less one unit is added, and one more unit where the number below is odd.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 numbers lie 2**-9 apart.
    small = round_half_even(tl.abs(x) * 512.0).to(tl.int32)
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def decode_e4m3(code):
    """Float32 of e4m3 bits in int32: the bits moved to where float16 has its own, whose bias is larger by 8."""
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
