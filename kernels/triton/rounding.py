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
