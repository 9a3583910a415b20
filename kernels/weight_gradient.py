"""The gradient of a weight: dW = c A^T B, a sum over the tokens.

A (M, P) is the gradient of the layer's output, B (M, Q) its input: 2 M P Q FLOP. Where dW has too few tiles for the
device the tokens are cut into parts, each with a float32 result of its own, which are then summed (``sums``): no
atomics, the same bits every time. It is rounded once. The parts are as large as the layer's activations: they wait for
no other sum, and what waits goes with them.
"""

from torch import Tensor

from .product_parts import product_parts
from .sums import Later, Sum, sums_of
from .tiles import cut

__all__ = ["weight_gradient"]


def weight_gradient(left: Tensor, right: Tensor, c: float = 1.0, later: Later | None = None) -> Tensor:
    """``c left^T right``, (P, Q), of ``left (M, P)`` and ``right (M, Q)``, equal dtypes, last dimensions gapless. Where
    it is a sum of parts it ends ``later``."""
    (count, p), q = left.shape, right.shape[1]
    out = product_parts(left, right, (False, False), cut("weight", left.dtype, left.device, p, q, count), c)
    if out.shape[0] == 1:
        return out[0]
    (found,) = sums_of([out], [Sum(left.dtype)], later)
    if later is not None:
        later.end()
    return found
