"""The gradient of a weight: dW = c A^T B, a sum over the tokens.

A (M, P) is the gradient of the layer's output, B (M, Q) its input: 2 M P Q FLOP. Where dW has too few tiles for the
device the tokens are cut into parts, each with a float32 result of its own, which are then summed (``sums``): no
atomics, the same bits every time. It is rounded once.
"""

from torch import Tensor

from .product_parts import product_parts
from .sums import Sum, sums_of
from .tiles import cut

__all__ = ["weight_gradient"]


def weight_gradient(left: Tensor, right: Tensor, c: float = 1.0) -> Tensor:
    """``c left^T right``, (P, Q), of ``left (M, P)`` and ``right (M, Q)``, equal dtypes, last dimensions gapless."""
    (count, p), q = left.shape, right.shape[1]
    out = product_parts(left, right, (False, False), cut("weight", left.dtype, left.device, p, q, count), c)
    return out[0] if out.shape[0] == 1 else sums_of([out], [Sum(left.dtype)])[0]
