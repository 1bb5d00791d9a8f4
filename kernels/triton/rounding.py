"""Device functions that several kernels share: rounding to the nearest even integer, and smooth functions."""

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
