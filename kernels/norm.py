"""The normalisations of one row in float32, for kernels that hold whole rows in registers.

layer    y = (x - mean) rstd    rstd = 1 / sqrt(var + eps)       the variance of centred rows: a large mean
rms      y = x rstd             rstd = 1 / sqrt(mean(x^2) + eps)         costs no accuracy
sphere   y = x rstd             rstd = 1 / max(|x|, eps)
none     y = x

backward, g = grad * weight:    dx = rstd (g - mean(g) - y <g, y> share)
mean(g) for layer alone; share is 1/D for layer and rms, for sphere 1 where |x| >= eps, else 0
"""

import triton
import triton.language as tl

__all__ = ["affine", "standardize", "standardize_backward"]


@triton.jit
def standardize(x, inside, eps, D: tl.constexpr, NORM: tl.constexpr):
    """``(y, rstd, share)`` of a tile of whole rows; y is 0 outside, rstd and share are (rows, 1)."""
    if NORM == "layer":
        mean = tl.sum(x, 1)[:, None] / D
        x = tl.where(inside, x - mean, 0.0)
    squares = tl.sum(x * x, 1)[:, None]
    rstd, share = rstd_of(squares, eps, D, NORM)
    return x * rstd, rstd, share


@triton.jit
def rstd_of(squares, eps, D: tl.constexpr, NORM: tl.constexpr):
    """``(rstd, share)`` from the sum of squares, for layer that of the centred row."""
    if NORM == "sphere":
        length = tl.sqrt(squares)
        return 1.0 / tl.maximum(length, eps), tl.where(length >= eps, 1.0, 0.0)
    else:
        return 1.0 / tl.sqrt(squares / D + eps), tl.full(squares.shape, 1.0 / D, tl.float32)


@triton.jit
def affine(y, weight, bias, columns, D: tl.constexpr):
    """``y * weight + bias``, where they are there."""
    if weight is not None:
        y = y * tl.load(weight + columns, columns < D, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        y = y + tl.load(bias + columns, columns < D, 0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def standardize_backward(g, y, rstd, share, inside, D: tl.constexpr, NORM: tl.constexpr):
    """dx of a tile of whole rows; g is 0 outside."""
    g_y = tl.sum(g * y, 1)[:, None] * share
    g_1 = tl.sum(g, 1)[:, None] / D if NORM == "layer" else 0.0
    return rstd * (g - g_1 - y * g_y)
