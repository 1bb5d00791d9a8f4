"""Elementary functions on float32 vectors; LLVM would call the C library once per lane.

Errors are relative to the largest of 1 and the result, over the whole range of float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx

from graphwright.kernels.tir.emit import T, let, splat

EXP_COEFFICIENTS = (1.0, 1.0, 0.5, 0.1666666716337204, 0.0416664853692054, 0.0083344273269177, 0.0013888889225199819)
"""Of a polynomial for exp on [-ln 2 / 2, ln 2 / 2]."""


def constant(value: float, lanes: int) -> Any:
    """A float32 in every lane."""
    return splat(tirx.const(value, "float32"), lanes) if lanes > 1 else tirx.const(value, "float32")


def integer(value: int, lanes: int) -> Any:
    """An int32 in every lane."""
    return splat(tirx.const(value, "int32"), lanes) if lanes > 1 else tirx.const(value, "int32")


def clamp(x: Any, low: float, high: float, lanes: int) -> Any:
    """X limited to [low, high]."""
    return T.min(T.max(x, constant(low, lanes)), constant(high, lanes))


def kind(dtype: str, lanes: int) -> str:
    """The name of a vector type; one lane is a scalar."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def _llvm(name: str, lanes: int) -> str:
    return f"llvm.{name}.v{lanes}f32" if lanes > 1 else f"llvm.{name}.f32"


def rounded(x: Any, lanes: int) -> Any:
    """The nearest integer, half to even, still float32."""
    return tirx.call_llvm_pure_intrin(kind("float32", lanes), _llvm("nearbyint", lanes), x)


def fma(a: Any, b: Any, c: Any, lanes: int) -> Any:
    """A * b + c, rounded once."""
    return tirx.call_llvm_pure_intrin(kind("float32", lanes), _llvm("fma", lanes), a, b, c)


def exp(x: Any, lanes: int) -> Any:
    """E to the x, error below 3e-7; 0 below -87."""
    x = let(clamp(x, -87.4, 88.3, lanes))
    power = let(rounded(x * constant(1.4426950408889634, lanes), lanes))
    rest = let(fma(power, constant(-0.693359375, lanes), x, lanes))
    rest = let(fma(power, constant(2.12194440e-4, lanes), rest, lanes))
    value = constant(EXP_COEFFICIENTS[-1], lanes)
    for coefficient in reversed(EXP_COEFFICIENTS[:-1]):
        value = fma(value, rest, constant(coefficient, lanes), lanes)
    exponent = tirx.Cast(kind("int32", lanes), power) + integer(127, lanes)
    return let(value * tirx.reinterpret(kind("float32", lanes), exponent << integer(23, lanes)))


def tanh(x: Any, lanes: int) -> Any:
    """Hyperbolic tangent, error below 3e-7."""
    doubled = exp(clamp(x, -10.0, 10.0, lanes) * constant(2.0, lanes), lanes)
    return constant(1.0, lanes) - constant(2.0, lanes) / (doubled + constant(1.0, lanes))


def erf(x: Any, lanes: int) -> Any:
    """The error function, error below 5e-7 (Abramowitz and Stegun 7.1.26)."""
    x = let(x)
    size = let(T.max(x, -x))
    t = let(constant(1.0, lanes) / fma(size, constant(0.3275911, lanes), constant(1.0, lanes), lanes))
    value = constant(1.061405429, lanes)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        value = fma(value, t, constant(coefficient, lanes), lanes)
    positive = let(constant(1.0, lanes) - value * t * exp(-size * size, lanes))
    return tirx.Select(x < constant(0.0, lanes), -positive, positive)


def silu(x: Any, lanes: int) -> Any:
    """X times its sigmoid."""
    return x / (constant(1.0, lanes) + exp(-x, lanes))


def gelu(x: Any, lanes: int) -> Any:
    """X times the normal distribution function."""
    half = constant(0.5, lanes) * x
    return half * (constant(1.0, lanes) + erf(x * constant(0.7071067811865476, lanes), lanes))


def gelu_tanh(x: Any, lanes: int) -> Any:
    """GELU with the usual approximation by tanh."""
    inner = (x + constant(0.044715, lanes) * x * x * x) * constant(0.7978845608028654, lanes)
    return constant(0.5, lanes) * x * (constant(1.0, lanes) + tanh(inner, lanes))


def relu(x: Any, lanes: int) -> Any:
    """X, or 0 where it is negative."""
    return T.max(x, constant(0.0, lanes))


def clamped_swiglu(gate: Any, up: Any, alpha: float, limit: float, lanes: int) -> Any:
    """(clamp(up) + 1) * gate * sigmoid(alpha * gate), with the gate limited from above."""
    gate = let(T.min(gate, constant(limit, lanes)))
    sigmoid = constant(1.0, lanes) / (constant(1.0, lanes) + exp(gate * constant(-alpha, lanes), lanes))
    return (clamp(up, -limit, limit, lanes) + constant(1.0, lanes)) * gate * sigmoid


ACTIVATIONS: Mapping[str, Callable[[Any, int], Any]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
}
"""By the names of `gated_activation`."""
