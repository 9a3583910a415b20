"""The FFN's activations and their derivatives in float32, element by element.

    relu        max(z, 0)
    gelu        z Phi(z)                                     Phi by erf
    gelu_tanh   z sigmoid(2 k (z + 0.044715 z^3))            k = sqrt(2 / pi);  (1 + tanh u) / 2 = sigmoid(2 u)
    silu        z sigmoid(z)

The gated ones multiply: swiglu is silu(gate) * up, geglu is gelu(gate) * up. A kernel is specialised by the name.
"""

import triton
import triton.language as tl

__all__ = ["ACTIVATION_OF_GATE", "activate", "activate_backward"]

ACTIVATION_OF_GATE = {"swiglu": "silu", "geglu": "gelu"}

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TANH_SCALE = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)
TANH_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """The activation of ``z``; NaN stays NaN, for relu too."""
    if NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    elif NAME == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * SQRT_HALF))
    elif NAME == "gelu_tanh":
        return z * tl.sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE)
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        return z * tl.sigmoid(z)


@triton.jit
def activate_backward(z, NAME: tl.constexpr):
    """``(activate(z), its derivative)``: they share the transcendental function."""
    if NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0)
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(z * SQRT_HALF))
        return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * INV_SQRT_2PI
    elif NAME == "gelu_tanh":
        s = tl.sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE)
        inner = (1.0 + z * z * TANH_CUBIC_SLOPE) * TANH_SCALE
        return z * s, s + z * s * (1.0 - s) * inner
    else:
        tl.static_assert(NAME == "silu", "unknown activation")
        s = tl.sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s))
