"""Round-to-nearest weight quantization, per output channel or in groups along the input.

    before                       after
    y = linear(x, W, b)          y = quantized_linear(x, codes, scale, zero_point, b)

Scales follow from the range of each group, see `graphwright.rounding`. Activations stay in floating point.
"""

from typing import Any

from torch import Tensor

from graphwright import rounding
from graphwright.pass_ import Paper
from graphwright.rounding import Quantized
from graphwright.scheme import Scheme
from graphwright.weight_quantizer import IntegerQuantizer


class Rtn(IntegerQuantizer):
    """Weight-only round-to-nearest."""

    name = "rtn"
    paper = Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        "Jacob et al.",
        2018,
        "1712.05877",
    )

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Any) -> Quantized:
        """Nearest codes on the grid of each group's range."""
        return rounding.quantize(weight, scheme)
