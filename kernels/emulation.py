"""What Triton's interpreter on the CPU does otherwise than a GPU, mended here and nowhere else.

It multiplies bfloat16 wrongly: the operands of a product are widened to float32 first, where the product is exact. It
converts float32 to bfloat16 by cutting off: numbers are rounded to nearest even before. A compiled kernel has neither.
It does not know the functions of a device's library: a reciprocal is a division there.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

__all__ = ["INTERPRETED", "dot", "reciprocal", "rounded"]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a b`` in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` (float32) in ``dtype``, rounded to nearest even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def reciprocal(x):
    """``1 / x`` (float32) within two units in the last place, 0 beyond 2^126: one instruction of NVIDIA's, where a
    division is six. For results that are rounded to 16 bits."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(1.0, x)
