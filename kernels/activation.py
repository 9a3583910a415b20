"""The FFN's activations and their derivatives in float32, element by element.

    relu        max(z, 0)
    gelu        z Phi(z)                                     Phi by erf
    gelu_tanh   z sigmoid(2 k (z + 0.044715 z^3))            k = sqrt(2 / pi);  (1 + tanh u) / 2 = sigmoid(2 u)
    silu        z sigmoid(z)

The gated ones multiply: swiglu is silu(gate) * up, geglu is gelu(gate) * up. A kernel is specialised by the name.

Where the result is rounded to 16 bits Phi comes from Abramowitz and Stegun's formula 7.1.26 for erf, whose error of
1.5e-7 is a thousandth of that rounding: a reciprocal, an exponential (which the derivative wants too) and seven
multiplications, a third of the instructions of the library's erf. float32 takes the library's. Reciprocals there are
the device's approximation.
"""

import triton
import triton.language as tl

from .emulation import reciprocal

__all__ = ["ACTIVATION_OF_GATE", "activate", "activate_backward"]

ACTIVATION_OF_GATE = {"swiglu": "silu", "geglu": "gelu"}

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)
TANH_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)
BELL_EXPONENT = tl.constexpr(-0.5 * 1.4426950408889634)
# Of formula 7.1.26 for erf(x), x = |z| / sqrt 2; halved, for Phi is (1 + erf) / 2.
ERF_SLOPE = tl.constexpr(0.3275911 * 0.7071067811865476)
ERF_1 = tl.constexpr(0.254829592 / 2)
ERF_2 = tl.constexpr(-0.284496736 / 2)
ERF_3 = tl.constexpr(1.421413741 / 2)
ERF_4 = tl.constexpr(-1.453152027 / 2)
ERF_5 = tl.constexpr(1.061405429 / 2)


@triton.jit
def _inverse(x, dtype: tl.constexpr):
    """``1 / x`` as exactly as ``dtype`` needs it."""
    if dtype == tl.float32:
        return 1.0 / x
    else:
        return reciprocal(x)


@triton.jit
def _normal(z, dtype: tl.constexpr):
    """``(Phi(z), e^(-z^2 / 2))``."""
    bell = tl.exp2(z * z * BELL_EXPONENT)
    if dtype == tl.float32:
        return 0.5 * (1.0 + tl.math.erf(z * SQRT_HALF)), bell
    else:
        t = _inverse(1.0 + tl.abs(z) * ERF_SLOPE, dtype)
        tail = t * (ERF_1 + t * (ERF_2 + t * (ERF_3 + t * (ERF_4 + t * ERF_5)))) * bell  # 1 - Phi(|z|)
        return tl.where(z < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _sigmoid(x, dtype: tl.constexpr):
    return _inverse(1.0 + tl.exp(-x), dtype)


@triton.jit
def _sigmoid_and_slope(x, dtype: tl.constexpr):
    """``(sigmoid(x), its derivative)``; the derivative as a product, for 1 - sigmoid(x) loses its digits."""
    e = tl.exp(-tl.abs(x))
    r = _inverse(1.0 + e, dtype)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def activate(z, NAME: tl.constexpr, dtype: tl.constexpr):
    """The activation of ``z``, to be rounded to ``dtype``; NaN stays NaN, for relu too."""
    if NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    elif NAME == "gelu":
        cdf, _ = _normal(z, dtype)
        return z * cdf
    elif NAME == "gelu_tanh":
        return z * _sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE, dtype)
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        return z * _sigmoid(z, dtype)


@triton.jit
def activate_backward(z, NAME: tl.constexpr, dtype: tl.constexpr):
    """``(activate(z), its derivative)``: they share the transcendental function."""
    if NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0)
    elif NAME == "gelu":
        cdf, bell = _normal(z, dtype)
        return z * cdf, cdf + z * bell * INV_SQRT_2PI
    elif NAME == "gelu_tanh":
        s, slope = _sigmoid_and_slope((z + z * z * z * TANH_CUBIC) * TANH_SCALE, dtype)
        return z * s, s + z * slope * (1.0 + z * z * TANH_CUBIC_SLOPE) * TANH_SCALE
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        s, slope = _sigmoid_and_slope(z, dtype)
        return z * s, s + z * slope
